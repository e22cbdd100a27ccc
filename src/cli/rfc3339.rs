//! Times in RFC 3339, also with an offset, as Python's `isoformat` writes them. Pure functions.

use std::time::{Duration, SystemTime};

/// Parses a time. The error is text for people.
pub(super) fn parse(text: &str) -> Result<SystemTime, String> {
    let problem = || "must be a time in RFC 3339, for example 2026-11-24T12:00:00Z".to_owned();
    // humantime accepts another Z.
    let ends_with_digit = |local: &str| local.ends_with(|last: char| last.is_ascii_digit());
    let parts = split_offset(text).filter(|(local, _)| ends_with_digit(local));
    let (local, offset) = parts.ok_or_else(problem)?;
    let local = humantime::parse_rfc3339(&format!("{local}Z")).map_err(|_| problem())?;
    let utc = match offset {
        Offset::East(offset) => local.checked_sub(offset),
        Offset::West(offset) => local.checked_add(offset),
    };
    utc.ok_or_else(problem)
}

/// How far the local time is from UTC.
enum Offset {
    East(Duration),
    West(Duration),
}

/// The local time and its offset: `Z`, or `+HH:MM`, or `-HH:MM`.
fn split_offset(text: &str) -> Option<(&str, Offset)> {
    if let Some(local) = text.strip_suffix(['Z', 'z']) {
        return Some((local, Offset::East(Duration::ZERO)));
    }
    let (local, offset) = text.split_at_checked(text.len().checked_sub("+00:00".len())?)?;
    let (hours, minutes) = offset.get(1..)?.split_once(':')?;
    let number = |digits: &str, most: u64| {
        let is_number = digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse::<u64>().ok().filter(|number| is_number && *number <= most)
    };
    let minutes = number(hours, 23)? * 60 + number(minutes, 59)?;
    let duration = Duration::from_secs(minutes * 60);
    match offset.get(..1)? {
        "+" => Some((local, Offset::East(duration))),
        "-" => Some((local, Offset::West(duration))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_converted_to_utc() {
        let noon = humantime::parse_rfc3339("2026-11-24T12:00:00.5Z").unwrap();
        for text in [
            "2026-11-24T12:00:00.5Z",
            "2026-11-24T12:00:00.500000+00:00",
            "2026-11-24T12:00:00.5-00:00",
            "2026-11-24T13:30:00.5+01:30",
            "2026-11-23T23:00:00.5-13:00",
        ] {
            assert_eq!(parse(text), Ok(noon), "{text}");
        }
    }

    #[test]
    fn other_texts_are_rejected() {
        for text in [
            "",
            "Z",
            "now",
            "2026-11-24",
            "2026-11-24T12:00:00",
            "2026-11-24T12:00:00+0100",
            "2026-11-24T12:00:00+24:00",
            "2026-11-24T12:00:00+01:60",
            "2026-11-24T12:00:00+-1:00",
            "2026-11-24T12:00:00ZZ",
            "1970-01-01T00:00:00+00:0１",
            "ä+00:00",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
