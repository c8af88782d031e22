//! What runc passes and a microVM cannot, each with its reason. Whoever adds a line here says why no work on rvm could help.

/// A case that rvm cannot pass.
pub struct Impossible {
    /// The suite, as [`super::suites`] names it.
    pub suite: &'static str,
    /// The program or group.
    pub part: &'static str,
    /// The case in it.
    pub case: &'static str,
    /// Why, in one sentence.
    pub reason: &'static str,
}

/// The list.
pub const LIST: &[Impossible] = &[];

/// The entry of a case.
pub fn entry(suite: &str, part: &str, case: &str) -> Option<&'static Impossible> {
    LIST.iter().find(|entry| entry.suite == suite && entry.part == part && entry.case == case)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_is_explained_to_users_too() {
        let page = include_str!("../../../docs/conformance.md");
        for entry in LIST {
            assert!(entry.reason.ends_with('.'), "{}", entry.case);
            let row = format!("| {} | {} | {} | {} |", entry.suite, entry.part, entry.case, entry.reason);
            assert!(page.contains(&row), "docs/conformance.md has no line\n{row}");
        }
    }
}
