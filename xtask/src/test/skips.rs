//! Tests that are left out: which, and whether there is a reason for it.

/// Tests that may be left out, each with its reason. Any other that is fails the run.
pub const EXPECTED: &[(&str, &str)] =
    &[("virtio::fs::tests::kernel::by_hand", "a tool for trials by hand: it runs a command of the user's")];

/// How the names of tests begin that may be left out on this machine, because they are run in the test host: they need the
/// controllers of cgroup version 2.
const FOR_TEST_HOST: &str = "container::limits::";

/// The same where the caller is not root.
const FOR_ROOT: &str = "container::";

/// Those of `skipped` that nobody has given a reason for.
pub fn unexpected(skipped: &[String]) -> Vec<&str> {
    skipped.iter().map(String::as_str).filter(|name| !is_expected(name) && !is_for_test_host(name)).collect()
}

/// Whether a test is one that the test host is for.
pub fn is_for_test_host(name: &str) -> bool {
    name.starts_with(FOR_TEST_HOST) || (name.starts_with(FOR_ROOT) && !nix::unistd::geteuid().is_root())
}

/// The names in what `--list` prints in the test host, where nothing is missing, without those left out everywhere.
pub fn in_test_host(list: &str) -> Vec<String> {
    let names = listed(list).into_iter().filter(|name| !is_expected(name));
    names.map(|name| format!("in the test host: {name}")).collect()
}

fn is_expected(name: &str) -> bool {
    EXPECTED.iter().any(|(expected, _)| *expected == name)
}

/// The names in what `--list` prints.
pub fn listed(list: &str) -> Vec<String> {
    list.lines().filter_map(|line| Some(without_kind(line.strip_suffix(": test")?).to_owned())).collect()
}

/// The name in a line that reports that a test was left out.
pub fn reported(line: &str) -> Option<String> {
    let (name, outcome) = line.trim_end().strip_prefix("test ")?.rsplit_once(" ... ")?;
    outcome.starts_with("ignored").then(|| without_kind(name).to_owned())
}

/// libtest-mimic puts a test's kind, or why it is left out, before its name.
fn without_kind(name: &str) -> &str {
    let name = if name.starts_with('[') { name.split_once(']').map_or(name, |(_, rest)| rest) } else { name };
    name.trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_both_harnesses_are_understood() {
        let list = "a::b: test\n[needs root] c::d: test\n\n1 test, 0 benchmarks\ne: benchmark\n";
        assert_eq!(listed(list), ["a::b", "c::d"]);
    }

    #[test]
    fn reports_of_both_harnesses_are_understood() {
        assert_eq!(reported("test a::b ... ignored, it is slow\n").as_deref(), Some("a::b"));
        assert_eq!(reported("test [no root] c::d    ... ignored\n").as_deref(), Some("c::d"));
        assert_eq!(reported("test            c::d    ... ignored\n").as_deref(), Some("c::d"));
        assert_eq!(reported("test a::b ... ok\n"), None);
        assert_eq!(reported("ignored\n"), None);
    }

    #[test]
    fn only_what_is_not_expected_is_unexpected() {
        let skipped = [EXPECTED[0].0, "other", "container::limits::x"].map(str::to_owned);
        assert_eq!(unexpected(&skipped), ["other"]);
    }

    #[test]
    fn in_the_test_host_nothing_it_is_for_may_be_left_out() {
        let list = format!("container::limits::x: test\n{}: test\n", EXPECTED[0].0);
        let skipped = in_test_host(&list);
        assert_eq!(skipped, ["in the test host: container::limits::x"]);
        assert_eq!(unexpected(&skipped), ["in the test host: container::limits::x"]);
    }
}
