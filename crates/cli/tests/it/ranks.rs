//! Several processes of one command, as `mpirun` starts them. Those that need an MPI are built with the
//! feature `mpi` alone; `.ci/mpi` runs them.

use super::support::Place;

#[cfg(feature = "mpi")]
mod mpi;

#[cfg(not(feature = "mpi"))]
#[test]
fn a_build_without_mpi_refuses_to_train_the_same_run_several_times() {
    let place = Place::new();
    for (variable, by) in [
        ("OMPI_COMM_WORLD_SIZE", "mpirun"),
        ("PMI_SIZE", "mpiexec"),
        ("SLURM_STEP_NUM_TASKS", "srun"),
    ] {
        let ran = place.run_in(&[(variable, "4")], &["train", "recipe.yaml"]);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        let expected = format!("error: {by} started 4 processes, and this build has no MPI");
        assert!(ran.stderr.starts_with(&expected), "{}", ran.stderr);
        assert!(ran.stderr.contains("--features mpi"), "{}", ran.stderr);
        assert!(!place.path("run").exists());
    }
}

#[test]
fn one_process_of_mpirun_trains_as_one_without() {
    let place = Place::new();
    let steps = ["train", "recipe.yaml", "--set", "train.max_steps=2", "--quiet"];
    let ran = place.run_in(&[("OMPI_COMM_WORLD_SIZE", "1")], &steps);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
}
