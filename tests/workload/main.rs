//! What `cargo xtask bench files` runs inside of containers: one kind of work with files, timed from within.
//!
//! `rvm-workload KIND DIRECTORY FILES` prints how many nanoseconds it took; FILES is the size of trees. What has to be there first (the file that is read,
//! the tree that is walked) is made before the clock starts, and stays for the next run.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// Where the work is done.
struct Place {
    directory: PathBuf,
    /// How many files a tree has.
    files: usize,
}

/// A kind of work; returns how long it took.
type Work = fn(&Place) -> io::Result<Duration>;

const KINDS: &[(&str, Work)] = &[
    ("write", |place| write_whole(place, false)),
    ("write-sync", |place| write_whole(place, true)),
    ("read", read_whole),
    ("random-read", |place| random(place, read_block)),
    ("random-write", |place| random(place, write_block)),
    ("create", create),
    ("tar", archive),
    ("status", status),
    ("delete", delete),
];

const MIB: usize = 1 << 20;
/// The size of the file that is read and written.
const LARGE: usize = 128 * MIB;
/// A page, and a block of random access.
const BLOCK: usize = 4096;
/// How many blocks are read or written at random places.
const BLOCKS: u64 = 4096;
/// How many files of a tree lie in one folder.
const FILES_IN_EACH: usize = 100;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (Some(kind), Some(directory), Some(Ok(files))) =
        (words.first(), words.get(1), words.get(2).map(|files| files.parse()))
    else {
        eprintln!("usage: rvm-workload KIND DIRECTORY FILES");
        return ExitCode::FAILURE;
    };
    let place = Place { directory: directory.into(), files };
    let Some((_, work)) = KINDS.iter().find(|(name, _)| name == kind) else {
        let names: Vec<_> = KINDS.iter().map(|(name, _)| *name).collect();
        eprintln!("there is no kind of work '{kind}', but {}", names.join(", "));
        return ExitCode::FAILURE;
    };
    match work(&place) {
        Ok(duration) => {
            println!("{}", duration.as_nanos());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{kind} in {directory} failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn timed(work: impl FnOnce() -> io::Result<()>) -> io::Result<Duration> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

/// The large file, whole.
fn large(place: &Place) -> io::Result<File> {
    let path = place.directory.join("large");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
    if file.metadata()?.len() != LARGE as u64 {
        fill(&file)?;
        file.sync_all()?;
    }
    Ok(file)
}

fn fill(mut file: &File) -> io::Result<()> {
    let block = vec![b'x'; MIB];
    for _ in 0..LARGE / MIB {
        file.write_all(&block)?;
    }
    Ok(())
}

fn write_whole(place: &Place, sync: bool) -> io::Result<Duration> {
    let path = place.directory.join("written");
    let _ = fs::remove_file(&path);
    timed(|| {
        let file = File::create(&path)?;
        fill(&file)?;
        if sync { file.sync_all() } else { Ok(()) }
    })
}

fn read_whole(place: &Place) -> io::Result<Duration> {
    large(place)?;
    let mut block = vec![0; MIB];
    timed(|| {
        let mut file = File::open(place.directory.join("large"))?;
        while file.read(&mut block)? > 0 {}
        Ok(())
    })
}

fn random(place: &Place, access: fn(&File, &mut [u8], u64) -> io::Result<()>) -> io::Result<Duration> {
    let file = large(place)?;
    let mut block = vec![b'y'; BLOCK];
    timed(|| {
        let mut state = 1_u64;
        for _ in 0..BLOCKS {
            // Knuth's generator: the same places each time.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let place = (state >> 33) % (LARGE / BLOCK) as u64;
            access(&file, &mut block, place * BLOCK as u64)?;
        }
        Ok(())
    })
}

fn read_block(file: &File, block: &mut [u8], offset: u64) -> io::Result<()> {
    file.read_exact_at(block, offset)
}

fn write_block(file: &File, block: &mut [u8], offset: u64) -> io::Result<()> {
    file.write_all_at(block, offset)
}

fn tree(place: &Place) -> PathBuf {
    place.directory.join("tree")
}

/// The paths of a tree's folders, and of the files in each.
fn paths(tree: &Path, files: usize) -> impl Iterator<Item = (PathBuf, Vec<PathBuf>)> {
    (0..files.div_ceil(FILES_IN_EACH)).map(move |number| {
        let folder = tree.join(format!("folder-{number}"));
        let count = FILES_IN_EACH.min(files - number * FILES_IN_EACH);
        let files = (0..count).map(|file| folder.join(format!("file-{file}"))).collect();
        (folder, files)
    })
}

fn make_tree(place: &Place) -> io::Result<()> {
    fs::create_dir(tree(place))?;
    for (folder, files) in paths(&tree(place), place.files) {
        fs::create_dir(&folder)?;
        for file in files {
            fs::write(file, [b'z'; 1000])?;
        }
    }
    Ok(())
}

/// The tree, whole.
fn whole_tree(place: &Place) -> io::Result<PathBuf> {
    if !tree(place).exists() {
        make_tree(place)?;
    }
    Ok(tree(place))
}

fn remove_tree(place: &Place) -> io::Result<()> {
    match fs::remove_dir_all(tree(place)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn create(place: &Place) -> io::Result<Duration> {
    remove_tree(place)?;
    timed(|| make_tree(place))
}

fn archive(place: &Place) -> io::Result<Duration> {
    whole_tree(place)?;
    timed(|| {
        let mut tar = Command::new("tar");
        let status = tar.args(["-cf", "tree.tar", "tree"]).current_dir(&place.directory).status()?;
        if status.success() { Ok(()) } else { Err(io::Error::other("tar failed")) }
    })
}

/// What `git status` does to a tree that has not changed: every directory is listed and every file's attributes are
/// read, once for the index and once for files that it does not know.
fn status(place: &Place) -> io::Result<Duration> {
    let tree = whole_tree(place)?;
    timed(|| {
        for (_, files) in paths(&tree, place.files) {
            for file in files {
                fs::symlink_metadata(file)?;
            }
        }
        for folder in fs::read_dir(&tree)? {
            for file in fs::read_dir(folder?.path())? {
                fs::symlink_metadata(file?.path())?;
            }
        }
        Ok(())
    })
}

fn delete(place: &Place) -> io::Result<Duration> {
    whole_tree(place)?;
    timed(|| remove_tree(place))
}
