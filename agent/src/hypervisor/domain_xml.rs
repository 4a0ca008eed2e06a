//! Reads the NICs on the managed bridge from libvirt's domain XML.
//!
//! The XML of an active domain names the bridge in `source/@bridge` for both `type='bridge'` and
//! `type='network'`, the TAP in `target/@dev`, and the reader of the TAP (vhost-net or QEMU) in
//! `driver/@name`.

use crate::proto::{DomainInterface, Mac};

/// Longest name of a network device, bytes, without the terminating zero.
const MAX_DEVICE_NAME: usize = 15;

/// Why domain XML is unusable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DomainXmlError {
    /// The text is not XML.
    #[error("libvirt's domain XML cannot be parsed: {0}; check the domain with `virsh dumpxml`")]
    Syntax(#[from] roxmltree::Error),
    /// An interface has an invalid MAC address.
    #[error("libvirt's domain XML has a MAC address `{0}`; correct it with `virsh edit`")]
    Mac(String),
    /// An element or attribute is missing.
    #[error(
        "libvirt's domain XML has no usable element `{0}`; check the domain with `virsh dumpxml`"
    )]
    Missing(&'static str),
}

/// Returns the NICs of a domain that are on `bridge`, in the order of the XML. `vhost_net` is true
/// if this host's kernel has vhost-net.
///
/// # Errors
///
/// See [`DomainXmlError`].
pub fn interfaces(
    xml: &str,
    bridge: &str,
    vhost_net: bool,
) -> Result<Vec<DomainInterface>, DomainXmlError> {
    let document = roxmltree::Document::parse(xml)?;
    // libvirt gives vhost-net only to KVM domains, whatever the XML of another domain names.
    let is_kvm = document.root_element().attribute("type") == Some("kvm");
    let mut interfaces = Vec::new();
    let devices = document
        .root_element()
        .children()
        .filter(|node| node.has_tag_name("devices"));
    for interface in devices
        .flat_map(|devices| devices.children())
        .filter(|node| node.has_tag_name("interface"))
    {
        let attribute = |element, name| {
            interface
                .children()
                .find(|node| node.has_tag_name(element))
                .and_then(|node| node.attribute(name))
        };
        if attribute("source", "bridge") != Some(bridge) {
            continue;
        }
        // libvirt always writes a MAC address.
        let Some(text) = attribute("mac", "address") else {
            continue;
        };
        let mac = parse_mac(text).ok_or_else(|| DomainXmlError::Mac(text.to_owned()))?;
        let target_dev = attribute("target", "dev")
            .filter(|name| name.len() <= MAX_DEVICE_NAME)
            .unwrap_or_default()
            .to_owned();
        // Without a driver in the XML, libvirt uses vhost-net if the kernel has it.
        let is_vhost = match attribute("driver", "name") {
            Some(driver) => driver == "vhost",
            None => vhost_net && attribute("model", "type") == Some("virtio"),
        };
        interfaces.push(DomainInterface {
            target_dev,
            mac,
            vhost: is_kvm && is_vhost,
        });
    }
    Ok(interfaces)
}

fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = Mac::default();
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = parts
            .next()
            .filter(|part| part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit()))
            .and_then(|part| u8::from_str_radix(part, 16).ok())?;
    }
    parts.next().is_none().then_some(mac)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIVE: &str = "<domain type='qemu' id='1'><name>v</name><devices>
        <interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/>
            <target dev='vnet0'/><model type='virtio'/></interface>
        <interface type='bridge'><mac address='52:54:00:00:00:02'/><source bridge='other'/>
            <target dev='vnet1'/></interface>
        <interface type='network'><mac address='52:54:00:00:00:03'/>
            <source network='lan' portid='x' bridge='br0'/><target dev='vnet2'/></interface>
        <interface type='user'><mac address='52:54:00:00:00:04'/></interface>
        </devices></domain>";

    #[test]
    fn interfaces_on_the_bridge_are_found_by_either_type() {
        let found = interfaces(LIVE, "br0", false).unwrap();
        let expected = [("vnet0", 1), ("vnet2", 3)].map(|(name, last)| DomainInterface {
            target_dev: name.to_owned(),
            mac: [0x52, 0x54, 0, 0, 0, last],
            vhost: false,
        });
        assert_eq!(found, expected);
    }

    #[test]
    fn interface_without_tap_has_an_empty_one() {
        let xml = LIVE.replace("<target dev='vnet0'/>", "");
        assert_eq!(interfaces(&xml, "br0", false).unwrap()[0].target_dev, "");
    }

    #[test]
    fn tap_is_read_by_vhost_where_named_or_by_default_with_virtio_if_there_is_vhost() {
        let vhost = |xml: &str, has| {
            let interfaces = interfaces(xml, "br0", has).unwrap();
            interfaces.iter().map(|it| it.vhost).collect::<Vec<_>>()
        };
        let kvm = LIVE.replace("type='qemu'", "type='kvm'");
        assert_eq!(vhost(&kvm, false), [false, false]);
        assert_eq!(vhost(&kvm, true), [true, false]);
        let qemu = kvm.replace("<model", "<driver name='qemu'/><model");
        assert_eq!(vhost(&qemu, true), [false, false]);
        let named = kvm.replace("<model", "<driver name='vhost'/><model");
        assert_eq!(vhost(&named, false), [true, false]);
    }

    #[test]
    fn tap_of_a_domain_that_is_not_kvms_is_never_read_by_vhost() {
        let named = LIVE.replace("<model", "<driver name='vhost'/><model");
        for xml in [LIVE, &named] {
            let interfaces = interfaces(xml, "br0", true).unwrap();
            assert!(interfaces.iter().all(|it| !it.vhost), "{interfaces:?}");
        }
    }

    #[test]
    fn broken_mac_is_an_error_that_names_it() {
        for mac in [
            "52:54:00:00:00",
            "52:54:00:00:00:0g",
            "52:54:00:00:00:01:02",
            "+1:54:00:00:00:01",
        ] {
            let xml = LIVE.replace("52:54:00:00:00:01", mac);
            assert_eq!(
                interfaces(&xml, "br0", false),
                Err(DomainXmlError::Mac(mac.to_owned()))
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(xml: String) {
            let _ = interfaces(&xml, "br0", false);
        }

        #[test]
        fn damaged_xml_is_parsed_or_refused(at in 0..LIVE.len(), byte in 0x20_u8..0x7f) {
            let mut xml = LIVE.as_bytes().to_vec();
            xml[at] = byte;
            let _ = interfaces(&String::from_utf8(xml).unwrap(), "br0", true);
        }

        #[test]
        fn any_mac_is_parsed_or_refused(mac: String) {
            let _ = parse_mac(&mac);
        }
    }
}
