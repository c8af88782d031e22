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
                source_of(suite).contains(&format!("(\"{story}\", ")),
                "{page}: {suite}::{story} is no story"
            );
        }
    }
}
