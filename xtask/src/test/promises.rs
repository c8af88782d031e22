//! What the documentation promises and names a story for: the story has to exist.

use std::fs;
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Names of the form `suite::story` between backquotes.
fn stories_named_in(text: &str) -> Vec<(&str, &str)> {
    text.split('`').skip(1).step_by(2).filter_map(|word| word.split_once("::")).collect()
}

/// The text of a suite: of its file, and of those in the folder of its name.
fn source_of(suite: &str) -> String {
    let folder = repository().join("tests/e2e");
    let parts = fs::read_dir(folder.join(suite)).into_iter().flatten().flatten().map(|entry| entry.path());
    let files = parts.chain([folder.join(format!("{suite}.rs"))]);
    files.filter_map(|file| fs::read_to_string(file).ok()).collect()
}

#[test]
fn every_story_that_the_docs_name_exists() {
    for (page, least) in [("docs/docker.md", 40), ("docs/network.md", 15)] {
        let text = fs::read_to_string(repository().join(page)).unwrap();
        let named = stories_named_in(&text);
        assert!(named.len() >= least, "{page} names only {} stories", named.len());
        for (suite, story) in named {
            assert!(
                source_of(suite).contains(&format!("\"{story}\",")),
                "{page}: {suite}::{story} is no story"
            );
        }
    }
}

#[test]
fn rvm_says_what_the_page_about_trouble_quotes() {
    let page = fs::read_to_string(repository().join("docs/troubleshooting.md")).unwrap();
    let sources = ["vmm/src/host.rs", "shim/src/install.rs"];
    let said = sources.map(|path| fs::read_to_string(repository().join(path)).unwrap()).concat();
    // What somebody sees is in the first column, and begins with it where it is rvm's own words.
    let quoted =
        page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` |")).map(|(words, _)| words);
    let quoted: Vec<_> = quoted.filter(|words| !words.starts_with("--")).collect();
    assert!(quoted.len() >= 4, "{quoted:?}");
    for words in quoted {
        assert!(said.contains(words), "rvm does not say {words:?}");
    }
}

/// Commands of a shell session: the lines that begin with a prompt.
fn commands_in(text: &str) -> Vec<&str> {
    text.lines().filter_map(|line| line.strip_prefix("$ ")).collect()
}

#[test]
fn the_page_of_the_walkthrough_has_the_commands_of_its_script() {
    let read = |path| fs::read_to_string(repository().join(path)).unwrap();
    let (page, script) = (read("docs/walkthrough.md"), read("tests/walkthrough/script"));
    let steps = script.lines().filter_map(|line| {
        let command = line.strip_prefix("run ").or_else(|| line.strip_prefix("quietly "))?;
        // Between quotes, of which one kind has a dollar with a backslash in it. A command of two lines ends without.
        let quote = command.chars().next()?;
        let command = &command[quote.len_utf8()..];
        Some(command.strip_suffix(quote).unwrap_or(command).replace("\\$", "$"))
    });
    assert_eq!(commands_in(&page), steps.collect::<Vec<_>>());
    for program in ["api.py", "database"] {
        let begin = format!("cat >{program} <<'END'\n");
        let text = script.split_once(&begin).and_then(|(_, rest)| rest.split_once("\nEND\n")).unwrap().0;
        assert!(page.contains(text), "{program} is another one on the page");
    }
}
