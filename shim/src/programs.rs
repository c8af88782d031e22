//! Programs for containers that are started to see how they start: no interpreter, no library, and but for one a single page.
//! They need nothing but the kernel, so the root filesystem is this and the folders of mounts.

/// Where the one segment is loaded.
const ADDRESS: u64 = 0x40_0000;
/// Sizes of the headers of an ELF file for 64 bits (elf(5)).
const FILE_HEADER: u16 = 64;
const SEGMENT_HEADER: u16 = 56;
/// Pages of the file that [`typical`] reads, and of its stack that it writes.
const READ_PAGES: u32 = 256;
const WRITTEN_PAGES: u32 = 64;
const PAGE: u32 = 4096;

/// Ends with 0.
pub fn succeed() -> Vec<u8> {
    executable(&[
        0x31, 0xff, // xor edi, edi
        0xb8, 60, 0, 0, 0, // mov eax, SYS_exit
        0x0f, 0x05, // syscall
    ])
}

/// Reads all of its file, a MiB, writes to a quarter as much, and ends with 0: what a start of a small program takes, such as a
/// shell that is linked statically.
pub fn typical() -> Vec<u8> {
    let [address, read, written, page] =
        [ADDRESS as u32, READ_PAGES, WRITTEN_PAGES, PAGE].map(u32::to_le_bytes);
    let code = [
        &[0xbe][..], // mov esi, its first page
        &address,
        &[0xb9], // mov ecx, pages
        &read,
        &[0x8a, 0x06], // mov al, [rsi]
        &[0x81, 0xc6], // add esi, page
        &page,
        &[0xff, 0xc9],       // dec ecx
        &[0x75, 0xf4],       // jnz to the load
        &[0x48, 0x89, 0xe7], // mov rdi, rsp
        &[0xb9],             // mov ecx, pages
        &written,
        &[0x48, 0x81, 0xef], // sub rdi, page
        &page,
        &[0x88, 0x0f],        // mov [rdi], cl
        &[0xff, 0xc9],        // dec ecx
        &[0x75, 0xf3],        // jnz to the subtraction
        &[0x31, 0xff],        // xor edi, edi
        &[0xb8, 60, 0, 0, 0], // mov eax, SYS_exit
        &[0x0f, 0x05],        // syscall
    ];
    let mut code = code.concat();
    code.resize((READ_PAGES * PAGE - u32::from(FILE_HEADER + SEGMENT_HEADER)) as usize, 0);
    executable(&code)
}

/// Waits for a signal, for ever.
pub fn pause() -> Vec<u8> {
    executable(&[
        0xb8, 34, 0, 0, 0, // mov eax, SYS_pause
        0x0f, 0x05, // syscall
        0xeb, 0xf7, // jmp to the start
    ])
}

/// Writes the kernel's release and version as uname(2) tells them: two fields of 65 bytes, each ended by zeroes.
pub fn kernel() -> Vec<u8> {
    executable(&[
        0x48, 0x81, 0xec, 0x90, 1, 0, 0, // sub rsp, 400
        0x48, 0x89, 0xe7, // mov rdi, rsp
        0xb8, 63, 0, 0, 0, // mov eax, SYS_uname
        0x0f, 0x05, // syscall
        0xbf, 1, 0, 0, 0, // mov edi, 1
        0x48, 0x8d, 0xb4, 0x24, 130, 0, 0, 0, // lea rsi, [rsp + 130]
        0xba, 130, 0, 0, 0, // mov edx, 130
        0xb8, 1, 0, 0, 0, // mov eax, SYS_write
        0x0f, 0x05, // syscall
        0x31, 0xff, // xor edi, edi
        0xb8, 60, 0, 0, 0, // mov eax, SYS_exit
        0x0f, 0x05, // syscall
    ])
}

/// A program for x86-64 that is this code, mapped once, to be read and executed.
fn executable(code: &[u8]) -> Vec<u8> {
    let headers = u64::from(FILE_HEADER + SEGMENT_HEADER);
    let size = headers + code.len() as u64;
    let mut file = Vec::with_capacity(size as usize);
    file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for half in [2_u16, 62] {
        file.extend(half.to_le_bytes()); // ET_EXEC, EM_X86_64
    }
    file.extend(1_u32.to_le_bytes());
    for place in [ADDRESS + headers, u64::from(FILE_HEADER), 0] {
        file.extend(place.to_le_bytes()); // entry, program headers, no section headers
    }
    file.extend(0_u32.to_le_bytes());
    for half in [FILE_HEADER, SEGMENT_HEADER, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for word in [1_u32, 5] {
        file.extend(word.to_le_bytes()); // PT_LOAD, to be read and executed
    }
    for field in [0, ADDRESS, ADDRESS, size, size, u64::from(PAGE)] {
        file.extend(field.to_le_bytes());
    }
    file.extend(code);
    file
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    use super::*;

    /// Writes the program to a file of its own, which nobody has open for writing when this returns.
    fn installed(program: &[u8]) -> tempfile::TempPath {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(program).unwrap();
        file.as_file().set_permissions(PermissionsExt::from_mode(0o755)).unwrap();
        file.into_temp_path()
    }

    #[test]
    fn the_programs_do_what_they_say() {
        assert!(Command::new(&*installed(&succeed())).status().unwrap().success());
        assert!(Command::new(&*installed(&typical())).status().unwrap().success());

        let told = Command::new(&*installed(&kernel())).output().unwrap().stdout;
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert_eq!(told.len(), 130);
        assert!(told.starts_with(release.trim().as_bytes()));

        let mut waiting = Command::new(&*installed(&pause())).stdin(Stdio::null()).spawn().unwrap();
        assert!(waiting.try_wait().unwrap().is_none());
        waiting.kill().unwrap();
        assert_eq!(waiting.wait().unwrap().signal(), Some(libc::SIGKILL));
    }
}
