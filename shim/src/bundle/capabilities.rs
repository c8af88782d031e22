//! Whether the sets of capabilities of a process fit together (capabilities(7)).

use std::collections::HashSet;

use oci_spec::runtime::{Capability, LinuxCapabilities};

use super::error::BundleError;

type Set = Option<HashSet<Capability>>;

/// Refuses what the kernel refuses. What it does not grant is left out, as the specification has it, with a warning.
pub(super) fn check(
    sets: &LinuxCapabilities,
    file: &'static str,
    prefix: &str,
    warnings: &mut Vec<String>,
) -> Result<(), BundleError> {
    if let Some(first) = missing(sets.inheritable(), &[sets.bounding()]).first() {
        return Err(BundleError::Field {
            file,
            field: format!("{prefix}capabilities.inheritable"),
            problem: format!("{first} is not in the bounding set: operation not permitted"),
        });
    }
    let granted = [
        ("effective", missing(sets.effective(), &[sets.permitted()])),
        ("ambient", missing(sets.ambient(), &[sets.permitted(), sets.inheritable()])),
    ];
    for (name, refused) in granted.iter().filter(|(_, refused)| !refused.is_empty()) {
        let places = if *name == "ambient" { "permitted and inheritable" } else { "permitted" };
        warnings.push(format!(
            "{prefix}capabilities.{name}: not granted, for they are not {places}: {}",
            refused.join(" ")
        ));
    }
    Ok(())
}

/// Names of those that are not in all of the `others`, in order.
fn missing(set: &Set, others: &[&Set]) -> Vec<String> {
    let is_in = |other: &Set, capability| other.as_ref().is_some_and(|other| other.contains(capability));
    let missing =
        set.iter().flatten().filter(|capability| !others.iter().all(|other| is_in(other, capability)));
    let mut names: Vec<_> = missing.map(|capability| format!("CAP_{capability}")).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(sets: serde_json::Value) -> Result<Vec<String>, String> {
        let sets = serde_json::from_value(sets).unwrap();
        let mut warnings = Vec::new();
        let checked = check(&sets, "config.json", "process.", &mut warnings);
        checked.map(|()| warnings).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_inheritable_has_to_be_in_the_bounding_set() {
        let error = outcome(
            serde_json::json!({ "inheritable": ["CAP_KILL", "CAP_CHOWN"], "bounding": ["CAP_KILL"] }),
        );
        let expected = "config.json: process.capabilities.inheritable: CAP_CHOWN is not in the bounding set: operation \
                        not permitted";
        assert_eq!(error.unwrap_err(), expected);
    }

    #[test]
    fn what_the_kernel_does_not_grant_is_told_of() {
        let all = serde_json::json!(["CAP_KILL", "CAP_CHOWN"]);
        let some = serde_json::json!(["CAP_KILL"]);
        let fitting = serde_json::json!({
            "bounding": all, "inheritable": all, "permitted": all, "effective": some, "ambient": some,
        });
        assert_eq!(outcome(fitting).unwrap(), Vec::<String>::new());
        let warnings = outcome(serde_json::json!({ "permitted": some, "effective": all, "ambient": some }));
        assert_eq!(
            warnings.unwrap(),
            [
                "process.capabilities.effective: not granted, for they are not permitted: CAP_CHOWN",
                "process.capabilities.ambient: not granted, for they are not permitted and inheritable: CAP_KILL",
            ]
        );
    }
}
