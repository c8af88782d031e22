//! The guest's first file system: the agent as `/init`, and nothing else.

use std::io::{self, Read, Write};

use cpio::newc::{Builder, ModeFileType, trailer};

/// No agent is this large; the archive's format holds 4 GiB.
const MAX_AGENT: u64 = 256 << 20;

/// Makes the archive around the agent's program.
pub fn build(agent: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut program = Vec::new();
    agent.take(MAX_AGENT).read_to_end(&mut program)?;
    let mut archive = Vec::with_capacity(program.len() + 1024);
    // The kernel opens /dev/console for its first process, in the folder that it makes itself.
    let mut writer =
        Builder::new("init").mode(0o755).set_mode_file_type(ModeFileType::Regular).nlink(1).write(
            &mut archive,
            // MAX_AGENT is far below 4 GiB, so the cast keeps the value.
            program.len() as u32,
        );
    writer.write_all(&program)?;
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
        let archive = build(&mut program.as_slice()).unwrap();
        assert!(archive.starts_with(b"070701"));
        assert_eq!(archive.len() % 4, 0);

        let mut reader = cpio::newc::Reader::new(archive.as_slice()).unwrap();
        assert_eq!(reader.entry().name(), "init");
        assert_eq!(reader.entry().mode(), 0o100_755);
        let mut content = Vec::new();
        reader.read_to_end(&mut content).unwrap();
        assert_eq!(content, program);
        let rest = reader.finish().unwrap();
        assert!(cpio::newc::Reader::new(rest).unwrap().entry().is_trailer());
    }
}
