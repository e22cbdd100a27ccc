//! Lists that end: what others write is read up to so many entries, and one more is an error. Values only.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// A sequence of at most `MOST` entries. A file's size alone bounds no memory: an entry may take a hundred times the bytes
/// that it is written with.
#[derive(Debug)]
pub(super) struct AtMost<T, const MOST: usize>(pub(super) Vec<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Deserialize<'de> for AtMost<T, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Entries(PhantomData))
    }
}

struct Entries<T, const MOST: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for Entries<T, MOST> {
    type Value = AtMost<T, MOST>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a sequence of at most {MOST}")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = sequence.next_element()? {
            if entries.len() == MOST {
                return Err(A::Error::custom(format_args!("a list of more than {MOST}")));
            }
            entries.push(entry);
        }
        Ok(AtMost(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_more_than_the_most_is_an_error() {
        let read = serde_json::from_str::<AtMost<u8, 2>>;
        assert_eq!(read("[1, 2]").unwrap().0, [1, 2]);
        assert_eq!(read("[1, 2, 3]").unwrap_err().to_string(), "a list of more than 2 at line 1 column 9");
        assert!(read("{}").unwrap_err().to_string().contains("expected a sequence of at most 2"));
    }
}
