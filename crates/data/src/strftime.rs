//! The C `strftime` directives that chat templates use, in UTC.
//!
//! Dates follow the proleptic Gregorian calendar; days are counted in 400-year eras of 146 097
//! days that begin on 1 March, so that the leap day is the last of its year.

use std::fmt::Write as _;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Writes the moment `seconds` after 1970-01-01T00:00:00Z as `format` says.
///
/// # Errors
/// Names the directive that is not known.
pub(crate) fn strftime(format: &str, seconds: i64) -> Result<String, String> {
    let days = seconds.div_euclid(86_400);
    let time = seconds.rem_euclid(86_400);
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    let (year, month, day) = date(days);
    let month_name = MONTHS[(month - 1) as usize];
    // 1970-01-01 was a Thursday.
    let weekday = DAYS[(days + 4).rem_euclid(7) as usize];
    let day_of_year = days - days_before(year) + 1;

    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut directive = characters.next();
        let padded = directive != Some('-');
        if !padded {
            directive = characters.next();
        }
        let number = match directive {
            Some('d') => (day, 2),
            Some('m') => (month, 2),
            Some('y') => (year.rem_euclid(100), 2),
            Some('H') => (hour, 2),
            Some('I') => ((hour + 11) % 12 + 1, 2),
            Some('M') => (minute, 2),
            Some('S') => (second, 2),
            Some('j') => (day_of_year, 3),
            Some('Y') => (year, 1),
            other => {
                match other {
                    Some('b' | 'h') => out.push_str(&month_name[..3]),
                    Some('B') => out.push_str(month_name),
                    Some('a') => out.push_str(&weekday[..3]),
                    Some('A') => out.push_str(weekday),
                    Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
                    Some('Z') => out.push_str("UTC"),
                    Some('%') => out.push('%'),
                    Some('F') => write!(out, "{year}-{month:02}-{day:02}").unwrap_or_default(),
                    Some('T') => {
                        write!(out, "{hour:02}:{minute:02}:{second:02}").unwrap_or_default()
                    }
                    Some(other) => {
                        return Err(format!("strftime_now: unknown directive `%{other}`"));
                    }
                    None => return Err("strftime_now: the format ends in `%`".to_owned()),
                }
                continue;
            }
        };
        let width = if padded { number.1 } else { 1 };
        write!(out, "{:0width$}", number.0).unwrap_or_default();
    }
    Ok(out)
}

/// Year, month (1–12) and day (1–31) of a day counted from 1970-01-01.
fn date(days: i64) -> (i64, i64, i64) {
    // 719 468 days lie between 0000-03-01 and 1970-01-01.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// Days from 1970-01-01 to 1 January of `year`.
fn days_before(year: i64) -> i64 {
    let before = year - 1;
    365 * (year - 1970) + before.div_euclid(4) - before.div_euclid(100) + before.div_euclid(400)
        - (1969 / 4 - 1969 / 100 + 1969 / 400)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Expected values are Python's `datetime.fromtimestamp(seconds, timezone.utc).strftime(format)`.
    #[test]
    fn dates_are_those_of_python() {
        let long = "%d %b %Y|%A %a %B|%H:%M:%S|%j|%-d/%-m|%y|%I %p|%%";
        assert_eq!(
            strftime(long, 0).unwrap(),
            "01 Jan 1970|Thursday Thu January|00:00:00|001|1/1|70|12 AM|%"
        );
        assert_eq!(
            strftime(long, 1_709_210_096).unwrap(),
            "29 Feb 2024|Thursday Thu February|12:34:56|060|29/2|24|12 PM|%"
        );
        assert_eq!(
            strftime(long, 4_102_444_799).unwrap(),
            "31 Dec 2099|Thursday Thu December|23:59:59|365|31/12|99|11 PM|%"
        );
        assert_eq!(strftime("%F %T", -1).unwrap(), "1969-12-31 23:59:59");
    }

    #[test]
    fn every_day_follows_the_one_before() {
        let mut last = date(-800_000);
        for day in -799_999..800_000 {
            let next = date(day);
            let step = if next.0 != last.0 {
                (next.0 - last.0, next.1, next.2, last.1, last.2) == (1, 1, 1, 12, 31)
            } else if next.1 != last.1 {
                next.1 == last.1 + 1 && next.2 == 1 && last.2 >= 28
            } else {
                next.2 == last.2 + 1
            };
            assert!(step, "{last:?} -> {next:?}");
            last = next;
        }
    }

    #[test]
    fn unknown_directives_are_named() {
        assert_eq!(strftime("%Q", 0).unwrap_err(), "strftime_now: unknown directive `%Q`");
        assert!(strftime("100%", 0).is_err());
    }
}
