//! Annotations of rvm's own (`dev.rvm.*`): what engines have no option for.

use std::num::NonZeroU64;

use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

use super::{BundleError, field};

/// What all their names begin with.
const PREFIX: &str = "dev.rvm.";
const RECEIVE_RATE: &str = "dev.rvm.network.receive-rate";
const SEND_RATE: &str = "dev.rvm.network.send-rate";

/// Whether a container may go on from a template: `on` or `off`.
pub const TEMPLATE: &str = "dev.rvm.template";

/// Below this no connection could be had.
const SLOWEST: u64 = 8_000;

/// Limits of each of the container's network interfaces, in bits a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRates {
    /// To the container.
    pub receive: Option<NonZeroU64>,
    /// From the container.
    pub send: Option<NonZeroU64>,
}

/// All that they say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Annotations {
    pub(super) network_rates: NetworkRates,
    /// Whether the container's machine may go on from a template.
    pub(super) may_use_template: bool,
}

/// Reads them, and warns of annotations that only look like rvm's.
pub(super) fn read(spec: &Spec, warnings: &mut Vec<String>) -> Result<Annotations, BundleError> {
    let (mut rates, mut may_use_template) = (NetworkRates::default(), true);
    let mut annotations: Vec<_> = spec.annotations().iter().flatten().collect();
    annotations.sort();
    for (name, value) in annotations {
        match name.as_str() {
            RECEIVE_RATE => rates.receive = Some(rate(name, value)?),
            SEND_RATE => rates.send = Some(rate(name, value)?),
            TEMPLATE => may_use_template = template(name, value)?,
            _ if name.starts_with(PREFIX) => warnings.push(format!(
                "annotations.\"{name}\" is ignored: there are {RECEIVE_RATE}, {SEND_RATE} and {TEMPLATE}"
            )),
            _ => {}
        }
    }
    Ok(Annotations { network_rates: rates, may_use_template })
}

fn template(name: &str, text: &str) -> Result<bool, BundleError> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(field(format!("annotations.\"{name}\""), format!("`{text}` is neither `on` nor `off`"))),
    }
}

/// Bits a second: a number, and perhaps one of the letters k, M and G, each a thousand times the last.
fn rate(name: &str, text: &str) -> Result<NonZeroU64, BundleError> {
    let (number, factor) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 1_000),
        Some(b'M') => (&text[..text.len() - 1], 1_000_000),
        Some(b'G') => (&text[..text.len() - 1], 1_000_000_000),
        _ => (text, 1),
    };
    let digits = number.bytes().all(|byte| byte.is_ascii_digit());
    let bits = number.parse::<u64>().ok().filter(|_| digits).and_then(|number| number.checked_mul(factor));
    bits.filter(|bits| *bits >= SLOWEST).and_then(NonZeroU64::new).ok_or_else(|| {
        let problem =
            format!("`{text}` is not a rate: give bits a second, at least 8k, such as 500k, 10M or 1G");
        field(format!("annotations.\"{name}\""), problem)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn annotations(name: &str, value: &str) -> (Result<Annotations, String>, Vec<String>) {
        let spec = serde_json::json!({ "ociVersion": "1.2.0", "annotations": { name: value } });
        let mut warnings = Vec::new();
        let read = super::read(&serde_json::from_value(spec).unwrap(), &mut warnings);
        (read.map_err(|error| error.to_string()), warnings)
    }

    fn read(name: &str, value: &str) -> (Result<NetworkRates, String>, Vec<String>) {
        let (read, warnings) = annotations(name, value);
        (read.map(|annotations| annotations.network_rates), warnings)
    }

    #[test]
    fn templates_can_be_switched_off() {
        let may_use = |value| annotations(TEMPLATE, value).0.map(|annotations| annotations.may_use_template);
        assert_eq!((may_use("on"), may_use("off")), (Ok(true), Ok(false)));
        assert!(may_use("no").unwrap_err().contains("dev.rvm.template"));
        assert!(annotations("com.example", "off").0.unwrap().may_use_template);
    }

    #[test]
    fn rates_are_read() {
        for (text, bits) in [("8000", 8_000), ("500k", 500_000), ("10M", 10_000_000), ("2G", 2_000_000_000)] {
            let expected = NonZeroU64::new(bits);
            let (rates, warnings) = read(SEND_RATE, text);
            assert_eq!(rates.unwrap(), NetworkRates { send: expected, receive: None });
            let (rates, _) = read(RECEIVE_RATE, text);
            assert_eq!(rates.unwrap(), NetworkRates { receive: expected, send: None });
            assert!(warnings.is_empty());
        }
    }

    #[test]
    fn what_is_no_rate_is_refused_by_its_name() {
        for text in ["", "M", "7999", "-5M", "+5M", "1.5M", "10 M", "10Mbit", "99999999999G", "0"] {
            let (rates, _) = read(SEND_RATE, text);
            let error = rates.unwrap_err();
            assert!(error.contains(SEND_RATE) && error.contains(&format!("`{text}`")), "{error}");
        }
    }

    #[test]
    fn a_slip_of_the_pen_is_told() {
        let (rates, warnings) = read("dev.rvm.network.sendrate", "1M");
        assert_eq!(rates.unwrap(), NetworkRates::default());
        assert!(warnings[0].contains("dev.rvm.network.sendrate") && warnings[0].contains(SEND_RATE));
        assert!(read("com.example", "1M").1.is_empty());
    }

    proptest! {
        #[test]
        fn no_value_causes_a_panic(text in ".*") {
            let _ = read(SEND_RATE, &text);
        }
    }
}
