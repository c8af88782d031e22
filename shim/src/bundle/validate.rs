//! What every runtime demands of a description, and the mounts in one form.

use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{Hook, Hooks, Linux, LinuxNamespaceType, Mount, PosixRlimitType, Process, Spec};
use rvm_protocol::MOST_OPEN_FILES;

use super::error::BundleError;
use super::options::{
    MountOptions, is_label, is_propagation, known_to_any_file_system, known_to_file_system,
};
use super::{CONFIG, capabilities, field, impossible};

/// File systems that the guest's own kernel provides.
const GUEST_FILE_SYSTEMS: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

/// Kernel interfaces that some engines bind from the host: a guest's container gets those of its own kernel.
const KERNEL_INTERFACES: [(&str, &str); 4] =
    [("/proc", "proc"), ("/sys", "sysfs"), ("/sys/fs/cgroup", "cgroup"), ("/dev/mqueue", "mqueue")];

/// Checks the description, and brings its mounts into one form.
pub(super) fn spec(spec: &mut Spec, bundle: &Path, warnings: &mut Vec<String>) -> Result<(), BundleError> {
    if !is_version(spec.version()) {
        let problem = format!("`{}` is not a version such as 1.2.0", spec.version());
        return Err(field("ociVersion", problem));
    }
    if spec.annotations().as_ref().is_some_and(|annotations| annotations.contains_key("")) {
        return Err(field("annotations", "a key is empty"));
    }
    // The specification wants it by `start` only, where the guest finds it missing.
    if let Some(description) = spec.process() {
        process(description, CONFIG, "process.", warnings)?;
    }
    let Some(linux) = spec.linux() else { return Err(field("linux", "it is missing")) };
    if let Some(name) =
        linux.rootfs_propagation().as_deref().filter(|name| !name.is_empty() && !is_propagation(name))
    {
        return Err(field("linux.rootfsPropagation", format!("`{name}` is no kind of propagation")));
    }
    namespaces(spec)?;
    if let Some(hooks) = spec.hooks() {
        check_hooks(hooks)?;
    }
    for (index, mount) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        normalise(mount, index, bundle, warnings)?;
    }
    Ok(())
}

/// Whether this has the form of Semantic Versioning 2.0.0, as far as anything could depend on it.
fn is_version(text: &str) -> bool {
    let core = text.split(['-', '+']).next().unwrap_or_default();
    let numbers: Vec<_> = core.split('.').collect();
    let is_number = |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    numbers.len() == 3 && numbers.iter().all(is_number)
}

/// Checks the description of a process, whose fields are named with a prefix.
pub(super) fn process(
    process: &Process,
    file: &'static str,
    prefix: &str,
    warnings: &mut Vec<String>,
) -> Result<(), BundleError> {
    let wrong = |field: &str, problem: String| {
        Err(BundleError::Field { file, field: format!("{prefix}{field}"), problem })
    };
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return wrong("args", "there is no command to run".into());
    }
    if !process.cwd().is_absolute() {
        return wrong("cwd", format!("`{}` is not an absolute path", process.cwd().display()));
    }
    for (index, variable) in process.env().iter().flatten().enumerate() {
        if !variable.contains('=') {
            return wrong(&format!("env[{index}]"), format!("`{variable}` is not of the form NAME=VALUE"));
        }
    }
    let strings = [("args", process.args()), ("env", process.env())];
    for (name, strings) in strings {
        if let Some(index) = strings.iter().flatten().position(|string| string.contains('\0')) {
            return wrong(&format!("{name}[{index}]"), "it contains a NUL character".into());
        }
    }
    let mut seen = HashSet::new();
    for (index, limit) in process.rlimits().iter().flatten().enumerate() {
        let name = limit.typ().to_string();
        if limit.soft() > limit.hard() {
            return wrong(
                &format!("rlimits[{index}]"),
                format!("the soft limit of {name} is above the hard one"),
            );
        }
        if limit.typ() == PosixRlimitType::RlimitNofile && limit.hard() > MOST_OPEN_FILES {
            return wrong(
                &format!("rlimits[{index}].hard"),
                format!(
                    "{} open files are more than the {MOST_OPEN_FILES} that a process can have",
                    limit.hard()
                ),
            );
        }
        if !seen.insert(name.clone()) {
            return wrong(&format!("rlimits[{index}]"), format!("{name} is there twice"));
        }
    }
    process.capabilities().as_ref().map_or(Ok(()), |sets| capabilities::check(sets, file, prefix, warnings))
}

fn namespaces(spec: &Spec) -> Result<(), BundleError> {
    let Some(linux) = spec.linux() else { return Ok(()) };
    let mut seen = HashSet::new();
    for (index, namespace) in linux.namespaces().iter().flatten().enumerate() {
        if !seen.insert(namespace.typ()) {
            return Err(field(format!("linux.namespaces[{index}].type"), "this namespace is there twice"));
        }
    }
    let mapped = |mappings: &Option<Vec<_>>| mappings.as_ref().is_some_and(|list| !list.is_empty());
    let mappings =
        [("uidMappings", mapped(linux.uid_mappings())), ("gidMappings", mapped(linux.gid_mappings()))];
    for (name, present) in mappings {
        match (present, seen.contains(&LinuxNamespaceType::User)) {
            (true, false) => {
                return Err(field(format!("linux.{name}"), "there is no user namespace to map for"));
            }
            (false, true) => return Err(field(format!("linux.{name}"), "a user namespace needs a mapping")),
            _ => {}
        }
    }
    clocks(linux, seen.contains(&LinuxNamespaceType::Time))
}

/// Checks by how much the clocks of a time namespace differ from those outside.
fn clocks(linux: &Linux, has_namespace: bool) -> Result<(), BundleError> {
    for (clock, offset) in linux.time_offsets().iter().flatten() {
        let name = format!("linux.timeOffsets.{clock}");
        if !has_namespace {
            return Err(field(name, "there is no time namespace to set the clock of"));
        }
        if !["monotonic", "boottime"].contains(&clock.as_str()) {
            return Err(field(name, "the clocks of a time namespace are `monotonic` and `boottime`"));
        }
        if offset.nanosecs().is_some_and(|nanoseconds| nanoseconds >= 1_000_000_000) {
            return Err(field(format!("{name}.nanosecs"), "it is a second or more"));
        }
    }
    Ok(())
}

fn check_hooks(hooks: &Hooks) -> Result<(), BundleError> {
    // Docker up to 27 plumbs the network in a prestart hook: deprecated and indispensable.
    #[allow(deprecated)]
    let prestart = hooks.prestart();
    let kinds: [(&str, &Option<Vec<Hook>>); 6] = [
        ("prestart", prestart),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (kind, list) in kinds {
        for (index, hook) in list.iter().flatten().enumerate() {
            let name = format!("hooks.{kind}[{index}]");
            if !hook.path().is_absolute() {
                let problem = format!("`{}` is not an absolute path", hook.path().display());
                return Err(field(format!("{name}.path"), problem));
            }
            if hook.timeout().is_some_and(|seconds| seconds <= 0) {
                return Err(field(format!("{name}.timeout"), "a timeout must be above zero"));
            }
        }
    }
    Ok(())
}

/// Makes the destination absolute, the source of a bind mount absolute, and the type say who makes the mount.
fn normalise(
    mount: &mut Mount,
    index: usize,
    bundle: &Path,
    warnings: &mut Vec<String>,
) -> Result<(), BundleError> {
    let name = format!("mounts[{index}]");
    mount.set_destination(destination(mount.destination(), &name, warnings)?);
    let options = MountOptions::parse(mount.options().as_deref().unwrap_or_default());
    let mapped = |mappings: &Option<Vec<_>>| mappings.as_ref().is_some_and(|list| !list.is_empty());
    if mapped(mount.uid_mappings()) || mapped(mount.gid_mappings()) {
        return Err(impossible(&name, "id-mapped mounts; give the user namespace's ids to the files"));
    }
    let kind = kind(mount, &options, &name)?;
    if kind != "bind" && options.bind.is_some() {
        not_a_bind(mount);
    }
    for option in &options.data {
        match option.as_str() {
            "idmap" | "ridmap" => {
                return Err(impossible(
                    &name,
                    "id-mapped mounts; give the user namespace's ids to the files",
                ));
            }
            label if is_label(label) => {
                warnings.push(format!(
                    "{name}: the label `{label}` is ignored: the guest has no security module"
                ));
            }
            known if known_to_file_system(&kind, known) => {}
            other if kind == "bind" && known_to_any_file_system(other) => warnings.push(format!(
                "{name}: the option `{other}` is ignored: a bind mount shows a file system that has its options already"
            )),
            unknown => {
                let problem = format!("`{unknown}` is not an option of a {kind} mount");
                return Err(field(format!("{name}.options"), problem));
            }
        }
    }
    if kind == "bind" {
        if options.propagation.iter().any(|propagation| propagation.kind == libc::MS_SHARED) {
            warnings.push(format!(
                "{name}: mounts that the container makes below {} do not appear on the host: they are the guest's",
                mount.destination().display()
            ));
        }
        let source = mount.source().as_deref().filter(|source| !source.as_os_str().is_empty());
        let source = source.ok_or_else(|| field(format!("{name}.source"), "a bind mount needs a source"))?;
        mount.set_source(Some(bundle.join(source)));
    }
    mount.set_typ(Some(kind));
    Ok(())
}

fn kind(mount: &Mount, options: &MountOptions, name: &str) -> Result<String, BundleError> {
    let kind = mount.typ().as_deref().unwrap_or_default();
    if kind == "bind" || options.bind.is_some() {
        let own = KERNEL_INTERFACES.iter().find(|(path, _)| {
            mount.source().as_deref() == Some(Path::new(path)) && mount.destination() == Path::new(path)
        });
        return Ok(own.map_or("bind", |(_, file_system)| file_system).into());
    }
    match kind {
        "" | "none" => Err(field(format!("{name}.type"), "it is missing, and no option says `bind`")),
        known if GUEST_FILE_SYSTEMS.contains(&known) => Ok(known.into()),
        other => Err(impossible(
            &format!("{name}.type"),
            &format!("mount a file system of type `{other}`; mount it on the host and bind it"),
        )),
    }
}

/// Leaves of the options of a bind mount what a file system of the guest's kernel takes.
fn not_a_bind(mount: &mut Mount) {
    let of_the_mount_itself = |option: &&String| {
        let alone = MountOptions::parse(std::slice::from_ref(*option));
        alone.bind.is_none() && alone.propagation.is_empty()
    };
    let options = mount.options().iter().flatten().filter(of_the_mount_itself).cloned().collect();
    mount.set_options(Some(options));
}

fn destination(path: &Path, name: &str, warnings: &mut Vec<String>) -> Result<PathBuf, BundleError> {
    if path.is_relative() && !path.as_os_str().is_empty() {
        warnings.push(format!("{name}.destination: `{}` is taken from the container's root", path.display()));
    }
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(part) => clean.push(part),
            Component::ParentDir => drop(clean.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    match clean.parent() {
        Some(_) => Ok(clean),
        None => Err(field(format!("{name}.destination"), "a mount cannot replace the container's root")),
    }
}
