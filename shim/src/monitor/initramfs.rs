//! The guest's first file system: the agent as `/init`, and nothing else.
//!
//! The agent begins at a page of the archive, so that the guest's kernel can take its pages as they are (patch
//! `initramfs-in-place`).

use std::io::{self, BufReader, Read};

use cpio::newc::{Builder, ModeFileType, trailer};

/// No agent is this large; the archive's format holds 4 GiB.
const MAX_AGENT: u64 = 256 << 20;
/// Where the agent begins: a page of the guest.
const BEGIN: usize = 4096;
/// The header of an entry, which its name follows with a zero at its end.
const HEADER: usize = 110;
/// Room for what is before the agent, and for padding and the end.
const FRAME: usize = BEGIN + 1024;
/// How much is read at once: few system calls, and what is read stays in the processor's cache until it is copied.
const PIECE: usize = 256 << 10;

/// Makes the archive around the agent's program of this size.
pub fn build(agent: impl Read, size: u64) -> io::Result<Vec<u8>> {
    if size > MAX_AGENT {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut archive = Vec::with_capacity(size as usize + FRAME);
    // The kernel opens /dev/console for its first process, in the folder that it makes itself.
    // Zeros behind a name are not part of it; they fill the page.
    let name = format!("{:\0<width$}", "init", width = BEGIN - HEADER - 1);
    let builder = Builder::new(&name).mode(0o755).set_mode_file_type(ModeFileType::Regular).nlink(1);
    // MAX_AGENT is far below 4 GiB, so the cast keeps the value.
    let mut writer = builder.write(&mut archive, size as u32);
    let copied = io::copy(&mut BufReader::with_capacity(PIECE, agent.take(size)), &mut writer)?;
    if copied < size {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    writer.finish()?;
    trailer(&mut archive)?;
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_holds_an_executable_init() {
        let program = b"\x7fELF and so on";
        let archive = build(program.as_slice(), program.len() as u64).unwrap();
        assert!(archive.starts_with(b"070701"));
        assert_eq!(archive.len() % 4, 0);
        assert_eq!(archive[BEGIN..BEGIN + program.len()], *program);

        let mut reader = cpio::newc::Reader::new(archive.as_slice()).unwrap();
        assert_eq!(reader.entry().name(), "init");
        assert_eq!(reader.entry().mode(), 0o100_755);
        let mut content = Vec::new();
        reader.read_to_end(&mut content).unwrap();
        assert_eq!(content, program);
        let rest = reader.finish().unwrap();
        assert!(cpio::newc::Reader::new(rest).unwrap().entry().is_trailer());
    }

    #[test]
    fn a_program_that_is_not_of_its_size_is_no_init() {
        assert_eq!(build(b"cut".as_slice(), 4).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(build(io::repeat(0), MAX_AGENT + 1).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        let grown = build(b"grown".as_slice(), 4).unwrap();
        let mut content = Vec::new();
        cpio::newc::Reader::new(grown.as_slice()).unwrap().read_to_end(&mut content).unwrap();
        assert_eq!(content, b"grow");
    }
}
