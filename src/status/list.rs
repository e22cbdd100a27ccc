//! Strict deserialization of foreign JSON: lists have a maximum length, and a list is not accepted
//! in place of an object. Values only, for any thread.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// A list of at most `MOST` entries. The size of a file does not limit the memory, as an entry may
/// take a hundred times its bytes in the file.
#[derive(Debug)]
pub(super) struct BoundedVec<T, const MOST: usize>(pub(super) Vec<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for BoundedVec<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Entries(PhantomData))
    }
}

struct Entries<T, const MOST: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for Entries<T, MOST> {
    type Value = BoundedVec<T, MOST>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MOST}")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = sequence.next_element()? {
            if entries.len() == MOST {
                return Err(A::Error::custom(format_args!("a list of more than {MOST}")));
            }
            entries.push(entry);
        }
        Ok(BoundedVec(entries))
    }
}

/// A struct that is an object in JSON. serde's derived code also accepts a list of the values.
#[derive(Debug)]
pub(super) struct Object<T>(pub(super) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Entry(PhantomData))
    }
}

struct Entry<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Entry<T> {
    type Value = Object<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Object)
    }
}

/// The raw values of these keys of an object. Other keys are skipped, even if they are invalid text
/// with a lone surrogate.
pub(super) fn read_values<'a, const N: usize>(
    json: &'a [u8],
    keys: [&str; N],
) -> serde_json::Result<[&'a RawValue; N]> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let values = deserializer.deserialize_map(Values(keys))?;
    deserializer.end()?;
    Ok(values)
}

struct Values<'k, const N: usize>([&'k str; N]);

impl<'de, const N: usize> Visitor<'de> for Values<'_, N> {
    type Value = [&'de RawValue; N];

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found: [Option<&RawValue>; N] = [None; N];
        // Raw, because a key with a lone surrogate is not a valid string.
        while let Some(key) = map.next_key::<&RawValue>()? {
            let key = serde_json::from_str::<String>(key.get()).unwrap_or_default();
            let position = self.0.iter().position(|name| *name == key);
            match position.and_then(|position| found.get_mut(position)) {
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
                Some(place) if place.is_none() => *place = Some(map.next_value()?),
                Some(_) => return Err(A::Error::custom(format_args!("two keys `{key}`"))),
            }
        }
        for (name, value) in self.0.iter().zip(found) {
            if value.is_none() {
                return Err(A::Error::custom(format_args!("no key `{name}`")));
            }
        }
        // All keys were found.
        Ok(found.map(|value| value.unwrap_or(RawValue::NULL)))
    }
}

/// The text of a JSON error without its line and column. Those of a part are not those of the file.
pub(super) fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    text.strip_suffix(&place).map_or_else(|| text.clone(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_is_not_accepted_as_object() {
        #[derive(serde::Deserialize)]
        struct Pair {
            one: u8,
            two: u8,
        }
        let read = serde_json::from_str::<Object<Pair>>;
        let Object(Pair { one, two }) = read(r#"{"two": 2, "more": [], "one": 1}"#).unwrap();
        assert_eq!((one, two), (1, 2));
        assert!(
            read("[1, 2]")
                .err()
                .unwrap()
                .to_string()
                .starts_with("invalid type: sequence, expected an object")
        );
    }

    #[test]
    fn other_keys_of_an_object_are_skipped() {
        let of = |json: &'static str| {
            let found = read_values(json.as_bytes(), ["a", "b"]);
            found.map(|found| found.map(RawValue::get)).map_err(|error| without_place(&error))
        };
        for json in [
            r#"{"a": [1], "b": "x"}"#,
            r#"{"\udcff": 0, "b": "x", "c": "\udcff", "a\ud800": {}, "a": [1]}"#,
            r#" {"\u0061":[1], "\\": 1, "b" : "x"} "#,
        ] {
            assert_eq!(of(json), Ok(["[1]", "\"x\""]), "{json}");
        }
        for (json, problem) in [
            (r#"{"a": 1}"#, "no key `b`"),
            (r#"{"a": 1, "b": 2, "a": 3}"#, "two keys `a`"),
            (r#"[1, 2]"#, "invalid type: sequence, expected an object"),
            (r#"{"a": 1, "b": 2}x"#, "trailing characters"),
            (r#"{"a": 1, "b": 2"#, "EOF while parsing an object"),
        ] {
            assert_eq!(of(json), Err(problem.to_owned()), "{json}");
        }
    }

    #[test]
    fn list_longer_than_the_maximum_is_an_error() {
        let read = serde_json::from_str::<BoundedVec<u8, 2>>;
        assert_eq!(read("[1, 2]").unwrap().0, [1, 2]);
        assert_eq!(
            read("[1, 2, 3]").unwrap_err().to_string(),
            "a list of more than 2 at line 1 column 9"
        );
        assert!(read("{}").unwrap_err().to_string().contains("expected a list of at most 2"));
    }
}
