//! Under which user id a sandbox runs.

/// First of the ids that root gives its sandboxes where all ids are mapped.
const UNUSED: u32 = 1 << 20;
/// Ids between those that systems give to people, from 1000 up, and those that they keep for
/// services and nobody, from 60000 up.
const BETWEEN: std::ops::Range<u32> = 50_000..60_000;

/// The id to change to: none where this process' own will do. The limit on processes does not hold
/// for the machine's root; it does for everybody else, the root of a container that is some plain
/// user outside among them. `map` is `/proc/self/uid_map`, `process` spreads what runs at once.
pub(super) fn other(own: u32, map: &str, process: u32) -> Option<u32> {
    if own != 0 {
        return None;
    }
    let ranges: Vec<[u32; 3]> = map
        .lines()
        .filter_map(|line| {
            let mut numbers = line.split_whitespace().map(str::parse);
            Some([numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?])
        })
        .collect();
    let within = |id: u32| {
        ranges.iter().find(|[first, _, count]| id >= *first && id - first < *count).copied()
    };
    let outside = within(0).map_or(0, |[_, outside, _]| outside);
    if outside != 0 {
        return None;
    }
    let far = UNUSED + process % UNUSED;
    let near = BETWEEN.start + process % (BETWEEN.end - BETWEEN.start);
    [far, near].into_iter().find(|id| within(*id).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_gives_an_id_that_exists_in_its_map() {
        let all = "         0          0 4294967295\n";
        assert_eq!(other(0, all, 5), Some(UNUSED + 5));
        assert_eq!(other(1000, all, 5), None);
        // A container with 65536 ids, whose root is the machine's.
        assert_eq!(other(0, "0 0 65536\n", 5), Some(BETWEEN.start + 5));
        // One whose root is somebody outside, and a namespace with a single id.
        assert_eq!(other(0, "0 100000 65536\n", 5), None);
        assert_eq!(other(0, "0 1000 1\n", 5), None);
        assert_eq!(other(0, "0 0 1\n", 5), None);
    }
}
