//! The system calls that a program in the sandbox may make.
//!
//! A list of what an interpreter needs to compute: memory, files that exist, time, signals, waiting.
//! Everything else answers "not permitted", what a later kernel brings too: sockets of any family,
//! other processes' memory, tracing, new namespaces, keyrings, shared memory and semaphores,
//! `io_uring`, BPF, performance counters, page faults handled in user space, file handles, mounts.
//! What can be limited by an argument is: a process changes its own limits and nobody's else, and
//! makes processes in the namespaces there are.

use crate::eval::error::Result;

/// The filter as the kernel loads it, for bubblewrap's `--seccomp`; none where this architecture's
/// calls are not known, where nothing may be run.
pub(super) fn program() -> Result<Option<Vec<u8>>> {
    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    return known::program().map(Some);
    #[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
    Ok(None)
}

/// The number of the call that handles keyrings.
pub(super) fn keyctl() -> i64 {
    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    return libc::SYS_keyctl;
    #[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
    -1
}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod known {
    use crate::eval::error::Result;
    use crate::eval::sandbox::refused;
    use libc::*;
    use seccompiler::{
        BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
        SeccompFilter, SeccompRule,
    };
    use std::collections::BTreeMap;

    /// Allowed whatever their arguments are.
    const ALLOWED: &[i64] = &[
        // memory
        SYS_brk,
        SYS_madvise,
        SYS_mmap,
        SYS_mprotect,
        SYS_mremap,
        SYS_munmap,
        // files and pipes
        SYS_chdir,
        SYS_close,
        SYS_close_range,
        SYS_dup,
        SYS_dup3,
        SYS_faccessat,
        SYS_faccessat2,
        SYS_fcntl,
        SYS_fstat,
        SYS_fstatfs,
        SYS_getcwd,
        SYS_getdents64,
        SYS_lseek,
        SYS_newfstatat,
        SYS_openat,
        SYS_pipe2,
        SYS_ppoll,
        SYS_pread64,
        SYS_pselect6,
        SYS_read,
        SYS_readlinkat,
        SYS_readv,
        SYS_statfs,
        SYS_statx,
        SYS_umask,
        SYS_write,
        SYS_writev,
        // processes and threads
        SYS_execve,
        SYS_exit,
        SYS_exit_group,
        SYS_futex,
        SYS_get_robust_list,
        SYS_getegid,
        SYS_geteuid,
        SYS_getgid,
        SYS_getgroups,
        SYS_getpgid,
        SYS_getpid,
        SYS_getppid,
        SYS_getpriority,
        SYS_getresgid,
        SYS_getresuid,
        SYS_getrusage,
        SYS_getsid,
        SYS_gettid,
        SYS_getuid,
        SYS_membarrier,
        SYS_rseq,
        SYS_sched_getaffinity,
        SYS_sched_getparam,
        SYS_sched_getscheduler,
        SYS_sched_yield,
        SYS_set_robust_list,
        SYS_set_tid_address,
        SYS_wait4,
        SYS_waitid,
        // signals
        SYS_kill,
        SYS_restart_syscall,
        SYS_rt_sigaction,
        SYS_rt_sigpending,
        SYS_rt_sigprocmask,
        SYS_rt_sigreturn,
        SYS_rt_sigsuspend,
        SYS_rt_sigtimedwait,
        SYS_sigaltstack,
        SYS_tgkill,
        SYS_tkill,
        // time and the machine
        SYS_clock_getres,
        SYS_clock_gettime,
        SYS_clock_nanosleep,
        SYS_getitimer,
        SYS_getrandom,
        SYS_gettimeofday,
        SYS_nanosleep,
        SYS_setitimer,
        SYS_sysinfo,
        SYS_times,
        SYS_uname,
    ];

    /// Older forms that only this architecture has.
    #[cfg(target_arch = "x86_64")]
    const OLDER: &[i64] = &[
        SYS_access,
        SYS_alarm,
        SYS_arch_prctl,
        SYS_dup2,
        SYS_fork,
        SYS_getpgrp,
        SYS_getrlimit,
        SYS_lstat,
        SYS_open,
        SYS_pause,
        SYS_pipe,
        SYS_poll,
        SYS_readlink,
        SYS_select,
        SYS_setrlimit,
        SYS_stat,
        SYS_time,
        SYS_vfork,
    ];
    #[cfg(target_arch = "aarch64")]
    const OLDER: &[i64] = &[SYS_getrlimit, SYS_setrlimit];

    /// New namespaces of any kind; that of time, whose bit is one of the signal's here, cannot be
    /// asked for in this call.
    const NEW: i32 = CLONE_NEWNS
        | CLONE_NEWCGROUP
        | CLONE_NEWUTS
        | CLONE_NEWIPC
        | CLONE_NEWUSER
        | CLONE_NEWPID
        | CLONE_NEWNET;
    /// What interpreters ask of an open file: whether it is a terminal, and that it be closed before
    /// another program.
    const ASKED: [u64; 4] = [TCGETS, TIOCGWINSZ, FIOCLEX, FIONREAD];
    /// A name, the end with the parent, and names of memory, which the C library gives.
    const OF_ITSELF: [u64; 4] =
        [PR_SET_NAME as u64, PR_GET_NAME as u64, PR_SET_PDEATHSIG as u64, 0x5356_4d41];

    pub(super) fn program() -> Result<Vec<u8>> {
        let built = build().map_err(|error| refused(&format!("no filter of calls: {error}")))?;
        let bytes = |code: seccompiler::sock_filter| {
            let [a, b] = code.code.to_ne_bytes();
            let [c, d, e, f] = code.k.to_ne_bytes();
            [a, b, code.jt, code.jf, c, d, e, f]
        };
        Ok(built.into_iter().flat_map(bytes).collect())
    }

    fn build() -> std::result::Result<BpfProgram, BackendError> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for &call in ALLOWED.iter().chain(OLDER) {
            rules.insert(call, Vec::new());
        }
        let mut only = |call: i64, argument: u8, len, operator: SeccompCmpOp, values: &[u64]| {
            let rule = |&value: &u64| {
                let len: &SeccompCmpArgLen = &len;
                let wanted = SeccompCondition::new(argument, len.clone(), operator.clone(), value)?;
                SeccompRule::new(vec![wanted])
            };
            let all = values.iter().map(rule).collect::<std::result::Result<_, BackendError>>()?;
            rules.insert(call, all);
            Ok::<(), BackendError>(())
        };
        let (half, whole) = (SeccompCmpArgLen::Dword, SeccompCmpArgLen::Qword);
        only(SYS_clone, 0, whole, SeccompCmpOp::MaskedEq(u64::from(NEW.cast_unsigned())), &[0])?;
        only(SYS_ioctl, 1, half.clone(), SeccompCmpOp::Eq, &ASKED)?;
        only(SYS_prctl, 0, half.clone(), SeccompCmpOp::Eq, &OF_ITSELF)?;
        only(SYS_prlimit64, 0, half, SeccompCmpOp::Eq, &[0])?;
        let arch = std::env::consts::ARCH.try_into()?;
        let denied = SeccompAction::Errno(EPERM.cast_unsigned());
        SeccompFilter::new(rules, denied, SeccompAction::Allow, arch)?.try_into()
    }
}
