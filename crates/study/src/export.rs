//! The few lines that run a study on schedulers that are there already.

use crate::plan::Plan;
use std::collections::BTreeSet;
use std::path::Path;

/// A scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheduler {
    /// An array job of Slurm.
    Slurm,
    /// An Indexed Job of Kubernetes.
    Kubernetes,
    /// A Snakefile.
    Snakemake,
    /// A shell script.
    Shell,
}

/// What to ask a scheduler for.
#[derive(Clone, Copy, Debug)]
pub struct Resources {
    /// Workers at once.
    pub workers: usize,
    /// Cores of each.
    pub cores: usize,
    /// Gigabytes of each.
    pub memory_gb: usize,
}

/// A word as a shell reads it back.
pub(crate) fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// The lines for `scheduler`; `program` and `folder` are as the workers see them.
pub fn export(
    scheduler: Scheduler,
    plan: &Plan,
    program: &Path,
    folder: &Path,
    resources: &Resources,
) -> String {
    let Resources { workers, cores, memory_gb } = *resources;
    let (program, folder) =
        (quoted(&program.display().to_string()), quoted(&folder.display().to_string()));
    let name: String = plan
        .name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .collect();
    let last = workers.max(1) - 1;
    match scheduler {
        Scheduler::Slurm => format!(
            "#!/bin/sh
# Runs the study on Slurm: sh THIS_FILE. All nodes have to see {folder}.
# A worker that is killed or runs out of time loses at most one checkpoint interval of a cell; run it again.
set -e
job=$(sbatch --parsable --job-name={name} --array=0-{last} --cpus-per-task={cores} --mem={memory_gb}G \\
    --signal=TERM@60 --output={folder}/slurm-%A_%a.txt \\
    --wrap=\"exec {program} --threads {cores} study run {folder} --no-wait\")
# What waits for choices is scored when all are through, and the report is written.
sbatch --dependency=afterany:$job --job-name={name}-report --cpus-per-task={cores} --mem={memory_gb}G \\
    --output={folder}/slurm-%j.txt \\
    --wrap=\"{program} --threads {cores} study run {folder} && {program} study report {folder}\"
"
        ),
        Scheduler::Kubernetes => format!(
            "# Runs the study as an Indexed Job: kubectl apply -f THIS_FILE. Replace the image and the claim.
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
spec:
  completionMode: Indexed
  completions: {workers}
  parallelism: {workers}
  backoffLimitPerIndex: 5
  template:
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: 60
      containers:
        - name: worker
          image: IMAGE
          # The index decides nothing: every worker takes what is free. The last ones score and report.
          command: [sh, -c]
          args:
            - >-
              {program} --threads {cores} study run {folder} &&
              {program} study report {folder}
          resources:
            requests: {{cpu: \"{cores}\", memory: {memory_gb}Gi}}
            limits: {{memory: {memory_gb}Gi}}
          volumeMounts: [{{name: study, mountPath: {folder}}}]
      volumes:
        - name: study
          persistentVolumeClaim: {{claimName: CLAIM}}
"
        ),
        Scheduler::Snakemake => {
            let ids: BTreeSet<&str> = plan
                .cells
                .iter()
                .filter(|cell| cell.kind == crate::store::Kind::Trained)
                .map(|cell| cell.id.as_str())
                .collect();
            let ids: Vec<String> = ids.iter().map(|id| format!("    \"{id}\",")).collect();
            format!(
                "# Runs the study with Snakemake: snakemake --snakefile THIS_FILE --cores {}
STUDY = {:?}
CELLS = [
{}
]


rule report:
    input: expand(STUDY + \"/cells/{{cell}}/result.json\", cell=CELLS)
    output: STUDY + \"/report/report.html\"
    threads: {cores}
    shell: \"{program} --threads {{threads}} study run {folder} && {program} study report {folder}\"


rule cell:
    output: STUDY + \"/cells/{{cell}}/result.json\"
    threads: {cores}
    resources: mem_mb={}
    shell: \"{program} --threads {{threads}} study run {folder} --cell {{wildcards.cell}} --no-wait\"
",
                workers * cores,
                folder.trim_matches('\''),
                ids.join("\n"),
                1000 * memory_gb
            )
        }
        Scheduler::Shell => format!(
            "#!/bin/sh
# Runs the study with {workers} workers on this machine: sh THIS_FILE. Stop and start it as you like.
set -e
i=0
while [ $i -lt {workers} ]; do
    {program} --threads {cores} study run {folder} &
    i=$((i + 1))
done
wait
{program} study report {folder}
"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::{cell, plan};

    #[test]
    fn lines_name_what_they_run() {
        let plan = plan(vec![cell("lora", "1e-3", 1)]);
        let resources = Resources { workers: 4, cores: 2, memory_gb: 8 };
        for (scheduler, expected) in [
            (Scheduler::Slurm, "--array=0-3 --cpus-per-task=2 --mem=8G"),
            (Scheduler::Kubernetes, "completionMode: Indexed"),
            (Scheduler::Snakemake, "\"lora-1e-3-1\","),
            (Scheduler::Shell, "-lt 4"),
        ] {
            let text = export(
                scheduler,
                &plan,
                Path::new("/opt/hydra lora"),
                Path::new("/d/s"),
                &resources,
            );
            assert!(text.contains(expected), "{text}");
            assert!(text.contains("'/opt/hydra lora' --threads"), "{text}");
        }
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }
}
