use super::*;
use std::fs;
use std::path::Path;

/// A folder like that of powercap, whose counters a test moves.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn root(&self) -> &Path {
        self.0.path()
    }

    fn set(&self, domain: &str, file: &str, value: impl ToString) {
        let folder = self.root().join(domain);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(file), format!("{}\n", value.to_string())).unwrap();
    }

    fn domain(&self, folder: &str, name: &str, range: u64, energy: u64) {
        self.set(folder, "name", name);
        self.set(folder, "max_energy_range_uj", range);
        self.set(folder, "energy_uj", energy);
    }

    fn move_to(&self, folder: &str, energy: u64) {
        self.set(folder, "energy_uj", energy);
    }

    fn meter(&self) -> Meter {
        let every = Duration::from_millis(5);
        Meter::start(&Options { powercap: self.root().to_owned(), every, ..Options::default() })
    }
}

const RANGE: u64 = 262_143_328_850;

#[test]
fn packages_and_their_memory_are_added_and_their_parts_are_not() {
    let tree = Tree::new();
    for package in [0, 1] {
        tree.domain(&format!("intel-rapl:{package}"), &format!("package-{package}"), RANGE, 100);
        tree.domain(&format!("intel-rapl:{package}:0"), "core", RANGE, 7);
        tree.domain(&format!("intel-rapl:{package}:1"), "uncore", RANGE, 7);
        tree.domain(&format!("intel-rapl:{package}:2"), "dram", RANGE, 7);
    }
    tree.domain("intel-rapl:2", "psys", RANGE, 7);
    tree.set("intel-rapl", "enabled", 1);
    let meter = tree.meter();
    let mark = meter.mark();
    for (folder, to) in [
        ("intel-rapl:0", 1_000_100),
        ("intel-rapl:0:0", 900_000_000),
        ("intel-rapl:0:1", 900_000_000),
        ("intel-rapl:0:2", 250_007),
        ("intel-rapl:1", 2_000_100),
        ("intel-rapl:1:2", 500_007),
        ("intel-rapl:2", 900_000_000),
    ] {
        tree.move_to(folder, to);
    }
    let used = meter.since(&mark);
    assert_eq!(used.joules, Some(3.75));
    assert_eq!(used.source.as_deref(), Some("rapl:package-0+dram+package-1+dram"));
    assert_eq!((used.reason, used.estimated), (None, false));
}

#[test]
fn domains_inside_of_one_another_count_once() {
    let tree = Tree::new();
    // As in /sys/devices/virtual/powercap, and shown flat as well.
    tree.domain("intel-rapl/intel-rapl:0", "package-0", RANGE, 0);
    tree.domain("intel-rapl/intel-rapl:0/intel-rapl:0:0", "dram", RANGE, 0);
    tree.domain("intel-rapl:0", "package-0", RANGE, 0);
    tree.domain("intel-rapl:0:0", "dram", RANGE, 0);
    // The same package once more, by another way.
    tree.domain("intel-rapl-mmio:0", "package-0", RANGE, 0);
    tree.domain("intel-rapl-mmio:0:0", "dram", RANGE, 0);
    let meter = tree.meter();
    assert_eq!(meter.since(&meter.mark()).source.as_deref(), Some("rapl:package-0+dram"));
    let nested = Tree::new();
    nested.domain("intel-rapl/intel-rapl:0", "package-0", RANGE, 0);
    nested.domain("intel-rapl/intel-rapl:0/intel-rapl:0:0", "dram", RANGE, 0);
    let meter = nested.meter();
    assert_eq!(meter.since(&meter.mark()).source.as_deref(), Some("rapl:package-0+dram"));
}

#[test]
fn a_counter_that_starts_again_goes_on_counting() {
    let tree = Tree::new();
    tree.domain("intel-rapl:0", "package-0", 10_000_000, 9_000_000);
    let meter = tree.meter();
    let mark = meter.mark();
    // Twice around, which two looks alone could not tell from once.
    for to in [500_000, 6_000_000, 2_000_000] {
        tree.move_to("intel-rapl:0", to);
        std::thread::sleep(Duration::from_millis(60));
    }
    assert_eq!(meter.since(&mark).joules, Some(1.5 + 5.5 + 6.0));
}

#[test]
fn a_counter_without_a_known_range_is_lost_when_it_starts_again() {
    let tree = Tree::new();
    tree.domain("intel-rapl:0", "package-0", 1, 9_000_000);
    fs::remove_file(tree.root().join("intel-rapl:0/max_energy_range_uj")).unwrap();
    let meter = tree.meter();
    let mark = meter.mark();
    tree.move_to("intel-rapl:0", 9_500_000);
    assert_eq!(meter.since(&mark).joules, Some(0.5));
    tree.move_to("intel-rapl:0", 100);
    let used = meter.since(&mark);
    assert!(used.reason.unwrap().contains("started again"));
    assert_eq!((used.joules, used.source), (None, None));
}

#[test]
fn a_counter_that_was_set_back_is_not_taken_for_a_full_one() {
    let tree = Tree::new();
    tree.domain("intel-rapl:0", "package-0", RANGE, 5_000_000);
    let meter = tree.meter();
    let mark = meter.mark();
    tree.move_to("intel-rapl:0", 3);
    let used = meter.since(&mark);
    assert_eq!(used.joules, None);
    assert!(used.reason.unwrap().ends_with("intel-rapl:0/energy_uj: was set back"));
}

#[test]
fn a_counter_that_goes_away_takes_the_figure_with_it_for_good() {
    let tree = Tree::new();
    tree.domain("intel-rapl:0", "package-0", RANGE, 0);
    tree.domain("intel-rapl:1", "package-1", RANGE, 0);
    let meter = tree.meter();
    let mark = meter.mark();
    tree.move_to("intel-rapl:0", 2_000_000);
    assert_eq!(meter.since(&mark).joules, Some(2.0));
    fs::remove_dir_all(tree.root().join("intel-rapl:1")).unwrap();
    let lost = meter.since(&mark);
    assert_eq!(lost.joules, None);
    let reason = lost.reason.unwrap();
    assert!(reason.starts_with("a counter was lost on the way: "), "{reason}");
    assert!(reason.ends_with("intel-rapl:1/energy_uj: is not there"), "{reason}");
    tree.domain("intel-rapl:1", "package-1", RANGE, 0);
    assert_eq!(meter.since(&mark).joules, None, "what happened in between is not known");
    assert_eq!(meter.since(&meter.mark()).joules, None);
}

#[test]
fn the_platform_counts_where_there_is_no_package() {
    let tree = Tree::new();
    tree.domain("intel-rapl:0", "psys", RANGE, 0);
    let meter = tree.meter();
    let mark = meter.mark();
    tree.move_to("intel-rapl:0", 1_000_000);
    let used = meter.since(&mark);
    assert_eq!((used.joules, used.source.as_deref()), (Some(1.0), Some("rapl:psys")));
}

#[test]
fn what_is_not_there_is_said() {
    let reason = |tree: &Tree| {
        let meter = tree.meter();
        let used = meter.since(&meter.mark());
        assert_eq!((used.joules, used.source), (None, None));
        assert_eq!(meter.idle(Duration::from_secs(3600)), None, "nothing is waited for");
        used.reason.unwrap()
    };
    let tree = Tree::new();
    assert!(reason(&tree).ends_with("holds no domain of RAPL"));
    tree.domain("intel-rapl:0:0", "core", RANGE, 0);
    assert!(reason(&tree).ends_with("holds no package, only core"));
    tree.domain("intel-rapl:0", "package-0", RANGE, 0);
    tree.set("intel-rapl:0", "energy_uj", "much");
    assert!(reason(&tree).ends_with("energy_uj: holds `much`; expected microjoules"));
    fs::remove_dir_all(tree.root()).unwrap();
    assert!(reason(&tree).contains(": no such folder; "));
}

#[cfg(unix)]
#[test]
fn a_counter_for_root_alone_says_what_helps() {
    use std::os::unix::fs::PermissionsExt;
    let tree = Tree::new();
    tree.domain("intel-rapl:0", "package-0", RANGE, 0);
    let file = tree.root().join("intel-rapl:0/energy_uj");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o000)).unwrap();
    let denied = fs::read(&file).is_err();
    let meter = tree.meter();
    let used = meter.since(&meter.mark());
    // Root reads it all the same.
    assert_eq!(used.joules.is_none(), denied);
    if denied {
        let reason = used.reason.unwrap();
        let remedy = format!("`sudo chmod a+r {}/*rapl:*/energy_uj`", tree.root().display());
        assert!(reason.contains("permission denied") && reason.contains(&remedy), "{reason}");
    }
}

#[test]
fn counters_that_stand_still_measure_nothing() {
    let tree = Tree::new();
    tree.domain("intel-rapl:0", "package-0", RANGE, 77);
    let meter = tree.meter();
    let mark = meter.mark();
    assert_eq!(meter.since(&mark).joules, Some(0.0), "a moment is too short to tell");
    std::thread::sleep(SURELY_MOVED);
    let used = meter.since(&mark);
    assert_eq!((used.joules, used.source), (None, None));
    assert_eq!(used.reason.as_deref(), Some("rapl:package-0: the counters stood still"));
}

#[test]
fn a_power_that_is_given_is_an_estimate() {
    let tree = Tree::new();
    tree.domain("intel-rapl:0", "package-0", RANGE, 0);
    let powercap = tree.root().to_owned();
    let meter = Meter::start(&Options { powercap, watts: Some(12.5), ..Options::default() });
    let mark = meter.mark();
    std::thread::sleep(Duration::from_millis(20));
    let used = meter.since(&mark);
    assert_eq!(used.joules, Some(12.5 * used.seconds));
    assert!(used.seconds >= 0.02 && used.estimated);
    assert_eq!(used.source.as_deref(), Some("estimate: 12.5 W x wall time"));
}

#[test]
fn idle_power_is_energy_over_time() {
    let tree = Tree::new();
    tree.domain("intel-rapl:0", "package-0", RANGE, 0);
    let meter = tree.meter();
    let file = tree.root().join("intel-rapl:0/energy_uj");
    let window = Duration::from_millis(200);
    let mover = std::thread::spawn(move || {
        std::thread::sleep(window / 4);
        fs::write(file, "3000000").unwrap();
    });
    let began = Instant::now();
    let idle = meter.idle(window).unwrap();
    let took = began.elapsed().as_secs_f64();
    mover.join().unwrap();
    assert!(idle <= 3.0 / window.as_secs_f64() && idle >= 3.0 / took, "{idle}");
}

#[test]
fn a_device_that_is_asked_for_and_not_there_is_said() {
    let tree = Tree::new();
    tree.domain("intel-rapl:0", "package-0", RANGE, 0);
    let nvidia = Nvidia::At("ffff:ff:1f.0".to_owned());
    let powercap = tree.root().to_owned();
    let meter = Meter::start(&Options { powercap, nvidia, ..Options::default() });
    let used = meter.since(&meter.mark());
    assert_eq!(used.source.as_deref(), Some("rapl:package-0"));
    assert!(used.reason.unwrap().starts_with("not counted: GPU: "));
}

/// Where the driver's library is, every device is read; elsewhere the reason names it.
#[cfg(feature = "nvml")]
#[test]
fn devices_are_read_where_there_are_any() {
    let tree = Tree::new();
    let powercap = tree.root().to_owned();
    let options = Options { powercap, nvidia: Nvidia::All, ..Options::default() };
    let meter = Meter::start(&options);
    let mark = meter.mark();
    // The counters of devices move some times a second.
    std::thread::sleep(Duration::from_millis(500));
    let used = meter.since(&mark);
    let reason = used.reason.unwrap();
    match used.source {
        Some(source) => {
            assert!(source.starts_with("nvml:"), "{source}");
            assert!(used.joules.unwrap() > 0.0);
            assert!(reason.starts_with("not counted: processor: "), "{reason}");
        }
        None => assert!(reason.contains("; GPU: NVIDIA's NVML"), "{reason}"),
    }
}
