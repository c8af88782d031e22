//! Where Debian packages come from: the mirror that the build machine's own apt is configured with.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{packages, process};

/// The base address of a Debian archive, fit for debootstrap.
pub fn debian_mirror() -> Result<String> {
    if let Some(mirror) = configured()? {
        return Ok(mirror);
    }
    // On a fresh machine apt may know the archive's name only once it has fetched the lists.
    if nix::unistd::geteuid().is_root() {
        packages::update()?;
    }
    configured()?.context(
        "no Debian archive among this machine's apt sources: the test host is made of Debian packages \
         and needs one, for instance in /etc/apt/sources.list.d/debian.sources",
    )
}

/// The HTTP proxy apt is configured with, if any; debootstrap does not ask apt.
pub fn apt_proxy() -> Result<Option<String>> {
    let line = process::text(Command::new("apt-config").args(["shell", "proxy", "Acquire::http::Proxy"]))?;
    Ok(shell_value(&line).filter(|value| value != "DIRECT"))
}

/// The base addresses of all Debian archives that apt is configured with, security updates among them.
pub fn debian_archives() -> Result<Vec<String>> {
    let mut archives: Vec<String> = Vec::new();
    for address in parse_archives(&targets()?) {
        let address = resolve_mirror_list(address)?;
        if !archives.contains(&address) {
            archives.push(address);
        }
    }
    Ok(archives)
}

fn configured() -> Result<Option<String>> {
    match parse_targets(&targets()?) {
        Some(address) => Ok(Some(resolve_mirror_list(address)?)),
        None => Ok(None),
    }
}

fn targets() -> Result<String> {
    process::text(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)",
        "Created-By: Packages",
    ]))
}

fn parse_archives(targets: &str) -> impl Iterator<Item = &str> {
    targets.lines().filter_map(|line| match line.split('|').collect::<Vec<_>>()[..] {
        ["Debian", _, "main", address] => Some(address),
        _ => None,
    })
}

/// The first archive that says it is Debian itself: not its security updates, not a vendor's.
fn parse_targets(targets: &str) -> Option<&str> {
    targets.lines().find_map(|line| match line.split('|').collect::<Vec<_>>()[..] {
        ["Debian", "Debian", "main", address] => Some(address),
        _ => None,
    })
}

/// Cloud images name a file with a list of mirrors instead of a mirror.
fn resolve_mirror_list(address: &str) -> Result<String> {
    let Some(path) = address.strip_prefix("mirror+file:") else {
        return Ok(address.to_owned());
    };
    let path = Path::new("/").join(path.trim_matches('/'));
    let list = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read the list of Debian mirrors {}", path.display()))?;
    match first_mirror(&list) {
        Some(mirror) => Ok(mirror.to_owned()),
        None => bail!("the list of Debian mirrors {} is empty", path.display()),
    }
}

fn first_mirror(list: &str) -> Option<&str> {
    list.lines().filter(|line| !line.starts_with('#')).find_map(|line| line.split_whitespace().next())
}

fn shell_value(line: &str) -> Option<String> {
    let value = line.trim().split_once('=')?.1.trim_matches('\'');
    (!value.is_empty()).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_of_debian_itself_is_found_among_others() {
        let targets = "Google|cloud|main|https://example.org/apt/\n\
                       Debian|Debian-Security|main|http://example.org/security/\n\
                       Debian|Debian|contrib|http://example.org/contrib/\n\
                       Debian|Debian|main|http://example.org/debian/\n";
        assert_eq!(parse_targets(targets), Some("http://example.org/debian/"));
        let archives = ["http://example.org/security/", "http://example.org/debian/"];
        assert_eq!(parse_archives(targets).collect::<Vec<_>>(), archives);
        assert_eq!(parse_targets("Ubuntu|Ubuntu|main|http://example.org/ubuntu/\n"), None);
    }

    #[test]
    fn a_mirror_list_gives_its_first_entry() {
        assert_eq!(
            first_mirror("# comment\n\nhttp://a.example/debian priority:1\nhttp://b.example\n"),
            Some("http://a.example/debian")
        );
        assert_eq!(first_mirror("# nothing\n"), None);
        assert_eq!(resolve_mirror_list("http://a.example/debian/").unwrap(), "http://a.example/debian/");
    }

    #[test]
    fn a_proxy_is_read_from_a_shell_assignment() {
        assert_eq!(shell_value("proxy='http://example.org:3128'\n"), Some("http://example.org:3128".into()));
        assert_eq!(shell_value(""), None);
    }
}
