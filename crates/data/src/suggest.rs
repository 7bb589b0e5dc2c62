//! "Did you mean": the known names nearest to a mistyped one.

/// The known names that resemble `name`, nearest first, at most three.
pub(crate) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let name = name.to_lowercase();
    let mut scored: Vec<(f64, &str)> = known
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(&name, candidate), candidate))
        .filter(|(score, _)| *score >= 0.75)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.into_iter().take(3).map(|(_, candidate)| candidate).collect()
}

/// "unknown KIND `name`; did you mean `x`? Known: a, b, c".
pub(crate) fn unknown(kind: &str, name: &str, known: &[&str]) -> String {
    let near = nearest(name, known.iter().copied());
    let hint = if near.is_empty() {
        String::new()
    } else {
        let quoted: Vec<String> = near.iter().map(|candidate| format!("`{candidate}`")).collect();
        format!("; did you mean {}?", quoted.join(" or "))
    };
    let end = if hint.is_empty() { ";" } else { "" };
    format!("unknown {kind} `{name}`{hint}{end} known: {}", known.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_errors_are_recognised_and_strangers_are_not() {
        assert_eq!(nearest("chatlm", ["chatml", "zephyr"]), ["chatml"]);
        assert!(nearest("xxxx", ["chatml", "zephyr"]).is_empty());
        assert_eq!(
            unknown("format", "alpacca", &["alpaca", "text"]),
            "unknown format `alpacca`; did you mean `alpaca`? known: alpaca, text"
        );
        assert_eq!(
            unknown("format", "zzz", &["alpaca", "text"]),
            "unknown format `zzz`; known: alpaca, text"
        );
    }
}
