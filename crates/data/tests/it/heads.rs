//! Finding heads as its users see it.

use crate::folder;
use hydralora_data::heads::{
    Corpus, Features, HeadsOptions, HeadsReport, Room, Rule, choose, find_heads, map_svg, page,
    partition,
};
use hydralora_data::{Error, SourceConfig};
use proptest::prelude::*;

const DOMAINS: [(&str, [&str; 8]); 3] = [
    ("cooking", ["flour", "butter", "oven", "whisk", "sugar", "dough", "bake", "recipe"]),
    ("law", ["court", "contract", "clause", "liable", "plaintiff", "statute", "appeal", "judge"]),
    ("code", ["function", "variable", "loop", "array", "compile", "string", "return", "pointer"]),
];

/// `each` texts of each of the first `domains` domains: seven of its words and two of anybody's.
fn corpus(domains: usize, each: usize) -> Corpus {
    let mut corpus = Corpus::default();
    let common = ["apple", "river", "window", "garden", "paper", "summer", "market", "engine"];
    let mut state = 7_usize;
    let mut next = |below: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for _ in 0..each {
        for (name, words) in &DOMAINS[..domains] {
            let mut text: Vec<&str> = (0..7).map(|_| words[next(8)]).collect();
            text.extend((0..2).map(|_| common[next(8)]));
            corpus.push(text.join(" "), name);
        }
    }
    corpus
}

fn find(corpus: &Corpus, options: &HeadsOptions) -> HeadsReport {
    let features = Features::tfidf(corpus, 8, options.seed).unwrap();
    find_heads(&features, corpus, options).unwrap()
}

fn quick() -> HeadsOptions {
    HeadsOptions { k_max: 6, seeds: 5, ..HeadsOptions::default() }
}

#[test]
fn three_domains_are_found_and_named() {
    let corpus = corpus(3, 60);
    for rule in [Rule::Stability, Rule::Silhouette, Rule::Elbow] {
        let report = find(&corpus, &HeadsOptions { rule, ..quick() });
        assert_eq!(report.num_experts, 3, "{}", rule.name());
    }
    let report = find(&corpus, &quick());
    let agreement = report.agreement.as_ref().unwrap();
    assert!(agreement.adjusted_rand > 0.95, "{agreement:?}");
    for cluster in &report.clusters {
        let words = DOMAINS.iter().find(|d| d.0 == cluster.domains[0].domain).unwrap().1;
        assert!(words.contains(&cluster.terms[0].as_str()), "{cluster:?}");
    }
    assert_eq!(report.assignment.clusters().len(), corpus.len());
    assert_eq!(report.clusters.iter().map(|c| c.size).sum::<usize>(), corpus.len());
    assert_eq!(report.rules.iter().map(|r| r.repetitions.len()).collect::<Vec<_>>(), [5; 4]);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["num_experts"], 3);
    assert_eq!(json["rule"], "stability");
}

#[test]
fn one_domain_is_one_cluster() {
    let corpus = corpus(1, 120);
    let report = find(&corpus, &quick());
    assert_eq!(report.num_experts, 1, "{:?}", report.reasons);
    assert!(report.agreement.is_none(), "there is nothing to agree with");
    assert_eq!(report.clusters.len(), 1);
}

#[test]
fn equal_texts_are_one_cluster_and_it_is_said() {
    let mut corpus = Corpus::default();
    for _ in 0..30 {
        corpus.push("butter melts slowly".to_owned(), "a");
    }
    let report = find(&corpus, &quick());
    assert_eq!(report.num_experts, 1);
    assert!(report.reasons[0].contains("all rows are alike"), "{:?}", report.reasons);
    assert!(report.curve.is_empty());
    assert!(report.map.is_empty() && report.hdbscan.is_none(), "nothing to draw or to compare");
    assert!(!page(&report).contains("<h2>Map"));
    assert!(map_svg(&report).contains("all rows are alike"));
    let report = find(&corpus, &HeadsOptions { k_min: 3, ..quick() });
    assert!(report.reasons[0].ends_with("3 is the fewest asked for"), "{:?}", report.reasons);
}

#[test]
fn empty_texts_are_left_out_and_counted() {
    let mut corpus = corpus(3, 40);
    for text in ["", "   ", "the and of", "!?"] {
        corpus.push(text.to_owned(), "law");
    }
    let report = find(&corpus, &quick());
    assert_eq!(report.features.blank, 4);
    assert!(report.notes.iter().any(|note| note.starts_with("4 texts left out")));
    assert_eq!(report.assignment.clusters().iter().filter(|cluster| cluster.is_none()).count(), 4);
    let mut empty = Corpus::default();
    empty.push(String::new(), "a");
    let error = Features::tfidf(&empty, 8, 0).unwrap_err();
    assert!(error.to_string().contains("nothing to cluster"), "{error}");
}

#[test]
fn too_few_rows_are_refused_and_few_bring_a_warning() {
    let small = corpus(1, 4);
    let features = Features::tfidf(&small, 8, 0).unwrap();
    let error = choose(&features, &HeadsOptions { k_min: 5, ..quick() }).unwrap_err();
    assert!(matches!(error, Error::TooFewRows { rows: 4, needed: 5 }), "{error}");
    let error = partition(&features, &small, 5, 0).unwrap_err();
    assert!(matches!(error, Error::TooFewRows { rows: 4, needed: 5 }), "{error}");
    let report = find(&small, &quick());
    assert!(report.notes.iter().any(|n| n == "4 rows allow no more than 4 clusters"));
    assert!(report.notes.iter().any(|n| n.contains("hardly more than a guess")));
    let mut one = Corpus::default();
    one.push("a lonely text".to_owned(), "a");
    let features = Features::tfidf(&one, 8, 0).unwrap();
    let error = choose(&features, &quick()).unwrap_err();
    assert!(matches!(error, Error::TooFewRows { rows: 1, needed: 2 }), "{error}");
}

#[test]
fn options_without_sense_are_refused() {
    let corpus = corpus(1, 10);
    let features = Features::tfidf(&corpus, 8, 0).unwrap();
    for (options, message) in [
        (HeadsOptions { k_min: 0, ..quick() }, "k_min is 0; expected at least 1"),
        (HeadsOptions { k_min: 4, k_max: 3, ..quick() }, "k_max is 3, below k_min, which is 4"),
        (HeadsOptions { seeds: 0, ..quick() }, "seeds is 0; expected at least 1"),
    ] {
        assert_eq!(choose(&features, &options).unwrap_err().to_string(), message);
    }
}

#[test]
fn files_of_the_wrong_encoding_are_named() {
    let folder = folder(&[("x.jsonl", b"{\"text\": \"caf\xe9\"}\n"), ("y.txt", b"\xff\xfea\0")]);
    for (name, part) in [("x.jsonl", "not valid UTF-8"), ("y.txt", "UTF-16")] {
        let error = Corpus::read(&[SourceConfig::new(name)], folder.path()).unwrap_err();
        assert!(error.to_string().contains(part) && error.to_string().contains(name), "{error}");
    }
}

#[test]
fn a_row_of_many_megabytes_does_no_harm() {
    let long = format!("{{\"text\": \"{}\"}}\n", "court contract clause ".repeat(400_000));
    let mut text = long;
    for row in 0..40 {
        text.push_str(&format!("{{\"text\": \"flour butter oven number{row}\"}}\n"));
    }
    let folder = folder(&[("x.jsonl", text.as_bytes())]);
    let corpus = Corpus::read(&[SourceConfig::new("x.jsonl")], folder.path()).unwrap();
    let report = find(&corpus, &quick());
    assert_eq!(report.features.shortened, 1);
    assert!(report.notes.iter().any(|note| note.contains("first 20,000 bytes")));
    assert!(report.clusters.iter().all(|cluster| cluster.example.chars().count() <= 161));
}

#[test]
fn rows_from_elsewhere_are_clustered_too() {
    let mut values = Vec::new();
    for row in 0..90 {
        for column in 0..12 {
            let own = if column % 3 == row % 3 { 3.0 } else { 0.0 };
            values.push(5.0 + own + ((row * 31 + column * 17) % 11) as f32 / 40.0);
        }
    }
    let features = Features::dense(values, 12, 4, 1).unwrap();
    let choice = choose(&features, &quick()).unwrap();
    assert_eq!(choice.num_experts, 3, "{:?}", choice.rules);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    /// The same seed gives the same report to the last digit, whatever the number of threads.
    #[test]
    fn threads_change_nothing(seed in 0_u64..1000, each in 5_usize..40, threads in 2_usize..6) {
        let corpus = corpus(3, each);
        let options = HeadsOptions { seed, k_max: 4, seeds: 3, ..HeadsOptions::default() };
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| find(&corpus, &options))
        };
        let (one, many) = (with(1), with(threads));
        prop_assert_eq!(&one.assignment, &many.assignment);
        prop_assert_eq!(one, many);
    }

    /// No text, however odd, makes it fall over.
    #[test]
    fn any_texts_give_a_report_or_an_error(texts in proptest::collection::vec("\\PC{0,60}", 1..25)) {
        let mut corpus = Corpus::default();
        for text in texts {
            corpus.push(text, "a");
        }
        let options = HeadsOptions { k_max: 3, seeds: 2, ..HeadsOptions::default() };
        if let Ok(features) = Features::tfidf(&corpus, 4, 0) {
            match find_heads(&features, &corpus, &options) {
                Ok(report) => prop_assert!((1..=3).contains(&report.num_experts)),
                Err(error) => prop_assert!(matches!(error, Error::TooFewRows { .. }), "{error}"),
            }
        }
    }
}

/// Lines of the three domains with their name, one a record.
fn lines(each: usize) -> Vec<u8> {
    let corpus = corpus(3, each);
    let line = |(text, domain): (&String, &u32)| {
        let domain = &corpus.domain_names()[*domain as usize];
        format!("{{\"text\": \"{text}\", \"kind\": \"{domain}\"}}\n")
    };
    corpus.texts().iter().zip(corpus.domains()).map(line).collect::<String>().into_bytes()
}

fn labelled(name: &str) -> SourceConfig {
    let mut source = SourceConfig::new(name);
    source.fields.insert("domain".to_owned(), "kind".to_owned());
    source
}

#[test]
fn a_corpus_that_does_not_fit_is_sampled_and_counted_whole() {
    let mut bytes = lines(2000);
    for text in ["", "the"] {
        bytes.extend(format!("{{\"text\": \"{text}\", \"kind\": \"law\"}}\n").bytes());
    }
    let folder = folder(&[("x.jsonl", &bytes)]);
    let sources = [labelled("x.jsonl")];
    let room = Room { texts: 800, ..Room::default() };
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let corpus = Corpus::read_within(&sources, folder.path(), room).unwrap();
            assert!(corpus.is_sample() && corpus.len() <= 800 && corpus.total() == 6002);
            (find(&corpus, &quick()), corpus)
        })
    };
    let (report, corpus) = with(1);
    assert_eq!(report, with(3).0, "threads change nothing");
    let all = Corpus::read(&sources, folder.path()).unwrap();
    let whole = find(&all, &quick());
    assert_eq!((report.num_experts, whole.num_experts), (3, 3));
    // Every row is counted, those without a word too, and falls where it does without a sample.
    assert_eq!((report.features.rows, report.features.blank), (6000, 2));
    assert_eq!(report.features.sample, Some(corpus.len()));
    assert_eq!(whole.features.sample, None);
    let sizes = |report: &HeadsReport| -> Vec<usize> {
        let mut sizes: Vec<usize> = report.clusters.iter().map(|c| c.size).collect();
        sizes.sort_unstable();
        sizes
    };
    for (sampled, whole) in sizes(&report).into_iter().zip(sizes(&whole)) {
        assert!(sampled.abs_diff(whole) < 40, "{sampled} {whole}");
    }
    assert_eq!(sizes(&report).iter().sum::<usize>(), 6000);
    assert!(report.agreement.as_ref().unwrap().adjusted_rand > 0.95);
    assert!(report.notes[0].contains("uniform sample"), "{:?}", report.notes);
    // Rows of the sample have a cluster, the others none.
    let known = (0..corpus.total()).filter(|&row| report.assignment.of(row).is_some()).count();
    assert_eq!(known, report.assignment.clusters().iter().flatten().count());
    let features = Features::tfidf(&corpus, 8, 41).unwrap();
    let found = partition(&features, &corpus, 3, 41).unwrap();
    assert_eq!(found, report.assignment);
}

#[test]
fn a_file_that_is_gone_before_it_is_counted_is_named() {
    let folder = folder(&[("x.jsonl", &lines(300))]);
    let room = Room { texts: 200, ..Room::default() };
    let corpus = Corpus::read_within(&[labelled("x.jsonl")], folder.path(), room).unwrap();
    fs_err::remove_file(folder.path().join("x.jsonl")).unwrap();
    let features = Features::tfidf(&corpus, 8, 0).unwrap();
    let error = find_heads(&features, &corpus, &quick()).unwrap_err();
    assert!(error.to_string().contains("x.jsonl"), "{error}");
}
