//! Kernel configuration as text: did every line that was asked for survive Kconfig's dependencies?

/// The options of `fragment` that `resolved` does not hold as asked.
pub fn dropped<'a>(fragment: &'a str, resolved: &str) -> Vec<&'a str> {
    let held: std::collections::HashSet<_> = options(resolved).collect();
    options(fragment).filter(|option| !held.contains(option)).collect()
}

fn options(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| line.starts_with("CONFIG_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_is_dropped_when_off_absent_or_different() {
        let fragment = "# why\nCONFIG_A=y\nCONFIG_B=y\nCONFIG_C=64\n\nCONFIG_D=y\n";
        let resolved = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=6\nCONFIG_X=y\n";
        assert_eq!(dropped(fragment, resolved), ["CONFIG_B=y", "CONFIG_C=64", "CONFIG_D=y"]);
    }

    #[test]
    fn the_projects_configuration_names_each_option_once() {
        let mut names: Vec<_> =
            options(super::super::CONFIG).filter_map(|line| Some(line.split_once('=')?.0)).collect();
        assert!(names.len() > 100);
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
