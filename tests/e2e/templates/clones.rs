//! What fifty clones of one template have in common that they must not.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Child, Command};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Templates;
use crate::Story;
use crate::bundle::{add_mounts, mount};
use crate::command::shell;
use crate::network::namespace::Namespace;
use crate::probe;

pub const STORIES: &[(&str, Story)] =
    &[("clones_share_no_secret_and_no_name", clones_share_no_secret_and_no_name)];

/// How many containers begin with one template.
const CLONES: usize = 50;
/// So many run at once. They make keys, and on one processor, which is emulated, none of fifty would be done in time.
const AT_ONCE: usize = 10;

/// Everything that has to be another in each clone, by its name.
const DIFFERENT: &[&str] = &[
    "random",
    "urandom",
    "canary",
    "uuid",
    "boot_id",
    "machine_id",
    "tls_key",
    "hostname",
    "eth0",
    "program",
    "heap",
    "mapping",
    "stack",
    "vdso",
];

fn clones_share_no_secret_and_no_name() -> Result<()> {
    let templates = Templates::new()?;
    templates.make()?;
    let bundle = probe::bundle("identity")?.edit(with_programs_of_the_host)?;
    let folder = tempfile::Builder::new().prefix("e2e-clones").tempdir()?;
    let config: Value = serde_json::from_str(&fs::read_to_string(bundle.config_path())?)?;
    let root = Path::new(bundle.path()).join("rootfs");
    let mut namespaces = Vec::new();
    for number in 0..CLONES {
        let namespace = Namespace::new(&format!("e2e-{number}"))?;
        namespace.plumb(&["link add eth0 type veth peer name far", "link set eth0 up"])?;
        let mut config = config.clone();
        namespace.join(&mut config);
        config["root"]["path"] = json!(root);
        config["hostname"] = json!(format!("clone-{number}"));
        let place = folder.path().join(number.to_string());
        fs::create_dir(&place)?;
        fs::write(place.join("config.json"), serde_json::to_vec(&config)?)?;
        namespaces.push(namespace);
    }
    let spawn = |number: &usize| -> Result<(usize, Child)> {
        let place = folder.path().join(number.to_string());
        Ok((*number, templates.spawn_at(&place.display().to_string(), &format!("story-{number}"))?))
    };
    let mut seen: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for batch in (0..CLONES).collect::<Vec<_>>().chunks(AT_ONCE) {
        for (number, clone) in batch.iter().map(spawn).collect::<Result<Vec<_>>>()? {
            let output = clone.wait_with_output()?;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
            let own: BTreeMap<_, _> = said.lines().filter_map(|line| line.split_once(' ')).collect();
            let mac = shell(&format!("ip netns exec e2e-{number} cat /sys/class/net/eth0/address"))?.text();
            ensure!(own.get("hostname") == Some(&format!("clone-{number}").as_str()), "{said}");
            ensure!(own.get("eth0") == Some(&mac.as_str()), "its interface is to have {mac}: {said}");
            for (what, value) in own {
                seen.entry(what.to_owned()).or_default().insert(value.to_owned());
            }
        }
    }
    for what in DIFFERENT {
        let values = seen.get(*what).with_context(|| format!("nobody told the {what}: {seen:?}"))?;
        ensure!(values.len() == CLONES, "{what} of {CLONES} clones: {values:?}");
    }
    // What a guest has from its machine could name it, and all clones alike.
    ensure!(!seen.contains_key("product_uuid"), "the machine has a name: {seen:?}");
    Ok(())
}

/// Programs that make keys and machine IDs.
fn with_programs_of_the_host(config: &mut Value) {
    let places = [("/usr", "/usr"), ("/lib", "/usr/lib"), ("/lib64", "/usr/lib64")];
    let mounts = places.map(|(place, source)| mount(place, "bind", source, &["rbind", "ro"]));
    add_mounts(config, mounts.into_iter().chain([mount("/tmp", "tmpfs", "tmpfs", &[])]));
}

/// Tells who this is, as the first process of a container.
pub fn tell_identity() -> Result<()> {
    // Before all else: what is drawn first is what clones would have in common.
    let mut random = [0_u8; 32];
    // SAFETY: the buffer is as long as is said, and outlives the call.
    let drawn = unsafe { libc::getrandom(random.as_mut_ptr().cast(), random.len(), 0) };
    ensure!(drawn == 32, "no random bytes: {}", io::Error::last_os_error());
    println!("random {}", hexadecimal(&random));
    println!("canary {}", hexadecimal(&at_random()));
    let mut urandom = [0; 32];
    io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut urandom)?;
    println!("urandom {}", hexadecimal(&urandom));
    for what in ["uuid", "boot_id"] {
        println!("{what} {}", fs::read_to_string(format!("/proc/sys/kernel/random/{what}"))?.trim());
    }
    println!("hostname {}", fs::read_to_string("/proc/sys/kernel/hostname")?.trim());
    println!("eth0 {}", fs::read_to_string("/sys/class/net/eth0/address")?.trim());
    if let Ok(name) = fs::read_to_string("/sys/class/dmi/id/product_uuid") {
        println!("product_uuid {}", name.trim());
    }
    tell_addresses()?;
    fs::create_dir_all("/tmp/root/etc")?;
    println!("machine_id {}", said("/usr/bin/systemd-machine-id-setup", &["--root=/tmp/root", "--print"])?);
    println!("tls_key {}", said("/usr/bin/openssl", &["genpkey", "-algorithm", "ed25519"])?);
    Ok(())
}

/// Where things are in this process's memory.
fn tell_addresses() -> Result<()> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let begin = |line: &str| line.split('-').next().unwrap_or_default().to_owned();
    // This program is not moved. One that is begins with what lies lowest in its memory.
    println!("program {}", begin(&said("/usr/bin/cat", &["/proc/self/maps"])?));
    for (what, mark) in [("heap", "[heap]"), ("stack", "[stack]"), ("vdso", "[vdso]")] {
        let line = maps.lines().find(|line| line.ends_with(mark));
        println!("{what} {}", begin(line.with_context(|| format!("no {mark}: {maps}"))?));
    }
    // SAFETY: a mapping of nothing, of a size that is possible, where the kernel likes.
    let mapping = unsafe {
        let (access, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        libc::mmap(std::ptr::null_mut(), 1 << 20, access, flags, -1, 0)
    };
    println!("mapping {mapping:?}");
    Ok(())
}

/// The bytes that the kernel gave to this process, which its canary is made of.
fn at_random() -> [u8; 16] {
    // SAFETY: the function takes any number.
    let place = unsafe { libc::getauxval(libc::AT_RANDOM) } as *const [u8; 16];
    // SAFETY: the kernel gives every process the address of 16 bytes, which stay.
    unsafe { *place }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a program says, as one line.
fn said(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} failed: {errors}");
    Ok(String::from_utf8_lossy(&output.stdout).trim().replace('\n', " "))
}
