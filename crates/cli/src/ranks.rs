//! Several processes of one command, as `mpirun` and `srun` start them: whether there are any, and how
//! they work together.

use crate::args::Global;
use crate::failure::bad_input;
use hydralora_train::ranks::Team;
use std::process::ExitCode;

/// What started several processes.
#[derive(Debug, PartialEq)]
struct Launch {
    /// Its name for people.
    by: &'static str,
    size: usize,
    /// Processes among them on this machine, where that is said.
    here: Option<usize>,
}

/// Where launchers say how many processes there are, and how many of them on this machine.
const LAUNCHERS: [(&str, &str, &str); 5] = [
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "mpirun"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "srun"),
    ("PMI_SIZE", "MPI_LOCALNRANKS", "mpiexec"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "mpirun"),
    ("PALS_SIZE", "PALS_LOCAL_SIZE", "mpiexec"),
];

impl Launch {
    /// What started more than one process, as the environment says.
    fn find(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        // Slurm says `4` or, of several nodes, `4(x2),3`: the largest is what a node has to have room for.
        let most = |text: &str| {
            let counts = text.split(',').filter_map(|of| of.split('(').next()?.trim().parse().ok());
            counts.max()
        };
        LAUNCHERS.into_iter().find_map(|(size, here, by)| {
            let size: usize = variable(size)?.trim().parse().ok().filter(|&size| size > 1)?;
            Some(Self { by, size, here: variable(here).as_deref().and_then(most) })
        })
    }
}

fn launch() -> Option<Launch> {
    Launch::find(|name| std::env::var(name).ok())
}

/// The threads of a process that has others beside it on the machine, where nobody bound it to some of the
/// cores; none for a process alone.
pub(crate) fn threads() -> Option<usize> {
    let here = launch()?.here?;
    threads_of(here, hydralora_runtime::available(), cores())
}

fn threads_of(here: usize, available: usize, cores: usize) -> Option<usize> {
    (available >= cores).then(|| (available / here.max(1)).max(1))
}

/// Cores of the machine, as far as the system says.
fn cores() -> usize {
    let text = hydralora_files::bytes_of("/proc/cpuinfo".as_ref()).unwrap_or_default();
    String::from_utf8_lossy(&text).lines().filter(|line| line.starts_with("processor")).count()
}

/// Does `work` as one of the processes that were started together; alone where there are no others. Only
/// the first of them talks.
pub(crate) fn with_team(
    global: &Global,
    work: impl FnOnce(&Global, &Team<'_>) -> anyhow::Result<ExitCode>,
) -> anyhow::Result<ExitCode> {
    match launch() {
        None => work(global, &Team::alone()),
        Some(launch) => join(global, &launch, work),
    }
}

#[cfg(not(feature = "mpi"))]
fn join(
    _: &Global,
    launch: &Launch,
    _: impl FnOnce(&Global, &Team<'_>) -> anyhow::Result<ExitCode>,
) -> anyhow::Result<ExitCode> {
    let Launch { by, size, .. } = launch;
    Err(bad_input(format!(
        "{by} started {size} processes, and this build has no MPI to train with them together, so each would \
         train the whole run; `cargo build --release --features mpi` makes one that can, and without {by} \
         one process trains alone"
    )))
}

#[cfg(feature = "mpi")]
fn join(
    global: &Global,
    launch: &Launch,
    work: impl FnOnce(&Global, &Team<'_>) -> anyhow::Result<ExitCode>,
) -> anyhow::Result<ExitCode> {
    use crate::failure::{code_of_training, exit_code};
    use crate::ui::tell;
    use hydralora_train::Error;
    use hydralora_train::ranks::{Failure, Mpi, Ranks};
    use std::panic::{AssertUnwindSafe, catch_unwind};

    let ranks = Mpi::join()?;
    if ranks.size() != launch.size {
        let (Launch { by, size, .. }, library) = (launch, Mpi::library());
        let expected = match *by {
            "srun" => format!("`srun --mpi=pmix`, and a Slurm that knows {library}"),
            by => format!("the {by} of {library}"),
        };
        return Err(bad_input(format!(
            "{by} started {size} processes, and the MPI that this build was linked with sees {}; expected \
             {expected}",
            ranks.size(),
        )));
    }
    let team = Team::new(&ranks, code_of_training);
    let quiet = Global { quiet: true, ..*global };
    let global = if team.writes() { global } else { &quiet };
    let done = catch_unwind(AssertUnwindSafe(|| {
        let done = work(global, &team);
        if let Err(error) = &done {
            team.give_up(Failure { message: format!("{error:#}"), code: exit_code(error) });
            return done;
        }
        match team.agree("the end of the command", Ok(())) {
            Ok(_) => done,
            Err(error) => Err(error.into()),
        }
    }));
    let rank = ranks.rank();
    let Ok(done) = done else {
        tell(format!("error: rank {rank} broke down, and with it the run"));
        ranks.abort(1)
    };
    let Err(error) = done else { return done };
    let code = exit_code(&error);
    let known = error.downcast_ref::<Error>();
    if matches!(known, Some(Error::Lost { .. })) {
        tell(format!("error: rank {rank}: {error:#}"));
        ranks.abort(code.into());
    }
    if team.writes() {
        let named = matches!(known, Some(Error::OfRank { .. } | Error::Disagree { .. }));
        let of = if named { "" } else { "rank 0: " };
        tell(format!("error: {of}{error:#}"));
    }
    // A process that ends with an error has the others killed: not before the first has told it.
    let _ = ranks.gather(&[]);
    Ok(ExitCode::from(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(variables: &[(&str, &str)]) -> Option<Launch> {
        Launch::find(|name| {
            let of = variables.iter().find(|(other, _)| *other == name);
            of.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn launchers_are_known_by_what_they_say() {
        let open = [("OMPI_COMM_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_LOCAL_SIZE", "2")];
        assert_eq!(found(&open), Some(Launch { by: "mpirun", size: 4, here: Some(2) }));
        let mpich = [("PMI_SIZE", "3"), ("PMI_RANK", "0")];
        assert_eq!(found(&mpich), Some(Launch { by: "mpiexec", size: 3, here: None }));
        let slurm = [("SLURM_STEP_NUM_TASKS", "11"), ("SLURM_STEP_TASKS_PER_NODE", "4(x2),3")];
        assert_eq!(found(&slurm), Some(Launch { by: "srun", size: 11, here: Some(4) }));
        // One process, and a script of a batch job, which is no task of a step.
        assert_eq!(found(&[("OMPI_COMM_WORLD_SIZE", "1")]), None);
        assert_eq!(found(&[("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0")]), None);
        assert_eq!(found(&[]), None);
    }

    #[test]
    fn processes_beside_each_other_share_the_cores_unless_they_are_bound() {
        assert_eq!(threads_of(4, 16, 16), Some(4));
        assert_eq!(threads_of(32, 16, 16), Some(1));
        assert_eq!(threads_of(4, 2, 16), None);
    }
}
