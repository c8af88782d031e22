//! Container IDs. They name folders and cgroups, so what they may consist of is strict.

use std::fmt;
use std::str::FromStr;

/// The longest file name of Linux.
const MAX_LENGTH: usize = 255;

/// A checked container ID.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ContainerId(String);

/// The ID breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid container ID format: {0:?} (1 to {MAX_LENGTH} letters, digits and any of _ + - . are allowed, \
     and neither '.' nor '..')"
)]
pub struct IdError(String);

impl FromStr for ContainerId {
    type Err = IdError;

    fn from_str(id: &str) -> Result<Self, IdError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
        let valid =
            (1..=MAX_LENGTH).contains(&id.len()) && id.bytes().all(allowed) && id != "." && id != "..";
        if valid { Ok(ContainerId(id.to_owned())) } else { Err(IdError(id.chars().take(80).collect())) }
    }
}

impl ContainerId {
    /// The ID as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_of_engines_are_accepted() {
        for id in
            ["a", "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", "a_b+c-d.e", "..a"]
        {
            assert_eq!(id.parse::<ContainerId>().unwrap().as_str(), id);
        }
    }

    #[test]
    fn ids_that_could_leave_the_folder_are_refused() {
        for id in ["", ".", "..", "a/b", "../a", "a b", "a\nb", "a\0", "ü", &"a".repeat(256)] {
            assert!(id.parse::<ContainerId>().is_err(), "{id:?}");
        }
    }

    proptest! {
        #[test]
        fn an_accepted_id_is_one_plain_path_component(id in any::<String>()) {
            if let Ok(id) = id.parse::<ContainerId>() {
                let path = std::path::Path::new(id.as_str());
                let components: Vec<_> = path.components().collect();
                prop_assert!(matches!(components[..], [std::path::Component::Normal(_)]));
            }
        }
    }
}
