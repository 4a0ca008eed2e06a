//! The name of a domain's agent in libvirt's metadata.
//!
//! ```text
//! <metadata><roamcast:agent xmlns:roamcast="urn:roamcast:agent:1" name="vms1"/></metadata>
//! ```
//!
//! libvirt carries the metadata to the destination of a migration and passes it to the hook there
//! before the migration begins. The destination thus learns the source's agent even if another
//! libvirt client started the migration.

use super::domain_xml::DomainXmlError;
use crate::proto::DomainUuid;
use crate::value::Name;

/// XML namespace of the element; the last part is its version.
pub const URI: &str = "urn:roamcast:agent:1";
/// XML prefix that libvirt gives the element.
pub const KEY: &str = "roamcast";

/// Largest domain XML that the hook reads, bytes.
pub const MAX_XML_BYTES: u64 = 4 * 1024 * 1024;

/// A domain that libvirt is about to bring to this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArrivingDomain {
    /// UUID, as in the XML.
    pub uuid: DomainUuid,
    /// Name, as in the XML.
    pub name: String,
    /// Agent of the domain's current host; `None` if the metadata has no name.
    pub agent: Option<Name>,
}

/// Returns the element with an agent's name.
pub fn element(agent: &Name) -> String {
    // A name contains no character that XML would have to escape.
    format!("<agent name='{agent}'/>")
}

/// Returns the agent that last wrote its name to a domain's metadata.
///
/// # Errors
///
/// [`DomainXmlError::Syntax`].
pub fn agent(xml: &str) -> Result<Option<Name>, DomainXmlError> {
    let document = roxmltree::Document::parse(xml)?;
    Ok(agent_of(document.root_element()))
}

fn agent_of(domain: roxmltree::Node<'_, '_>) -> Option<Name> {
    domain
        .children()
        .filter(|node| node.has_tag_name("metadata"))
        .flat_map(|metadata| metadata.children())
        .find(|node| node.has_tag_name((URI, "agent")))
        .and_then(|agent| agent.attribute("name"))
        .and_then(|name| Name::try_from(name.to_owned()).ok())
}

/// Reads the XML of an arriving domain, which libvirt passes to the hook.
///
/// # Errors
///
/// [`DomainXmlError`]: the text is not XML, or not the XML of a domain with name and UUID.
pub fn arriving(xml: &str) -> Result<ArrivingDomain, DomainXmlError> {
    let document = roxmltree::Document::parse(xml)?;
    let root = document.root_element();
    let text = |element| {
        root.children()
            .find(|node| node.has_tag_name(element))
            .and_then(|node| node.text())
            .map(str::trim)
            .filter(|text| !text.is_empty())
    };
    let name = text("name").ok_or(DomainXmlError::Missing("name"))?;
    let uuid = text("uuid").and_then(|uuid| uuid.parse().ok());
    Ok(ArrivingDomain {
        uuid: uuid.ok_or(DomainXmlError::Missing("uuid"))?,
        name: name.to_owned(),
        agent: agent_of(root),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const XML: &str = "<domain type='kvm' id='3'><name>viewer</name>
        <uuid>07070707-0707-0707-0707-070707070707</uuid>
        <metadata><other:agent xmlns:other='urn:other' name='wrong'/>
            <roamcast:agent xmlns:roamcast='urn:roamcast:agent:1' name='vms1'/></metadata>
        </domain>";

    fn name(name: &str) -> Option<Name> {
        Some(Name::try_from(name.to_owned()).unwrap())
    }

    #[test]
    fn arriving_domain_names_itself_and_its_agent() {
        let expected = ArrivingDomain {
            uuid: DomainUuid([7; 16]),
            name: "viewer".to_owned(),
            agent: name("vms1"),
        };
        assert_eq!(arriving(XML), Ok(expected));
        assert_eq!(agent(XML), Ok(name("vms1")));
    }

    #[test]
    fn metadata_of_others_is_not_taken_for_an_agents() {
        for other in ["urn:roamcast:agent:2", "urn:roamcast:agent:1x", "urn:x"] {
            let xml = XML.replace(URI, other);
            assert_eq!(agent(&xml), Ok(None), "{other}");
        }
        let elsewhere = XML.replace("metadata>", "devices>");
        assert_eq!(agent(&elsewhere), Ok(None));
    }

    #[test]
    fn name_that_no_agent_has_is_none() {
        for bad in ["", "a b", "../x", &"x".repeat(64)] {
            let xml = XML.replace("vms1", bad);
            assert_eq!(agent(&xml), Ok(None), "{bad}");
        }
    }

    #[test]
    fn domain_without_name_or_uuid_is_refused() {
        for (element, text) in [("name", "<name>viewer</name>"), ("uuid", "07070707-")] {
            let xml = XML.replace(text, "");
            assert_eq!(arriving(&xml), Err(DomainXmlError::Missing(element)));
        }
    }

    #[test]
    fn element_is_what_is_read_back() {
        let agent_name = name("a.b-c_1").unwrap();
        let element = element(&agent_name).replace("<agent", &format!("<agent xmlns='{URI}'"));
        let xml = format!("<domain><metadata>{element}</metadata></domain>");
        assert_eq!(agent(&xml), Ok(Some(agent_name)));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(xml: String) {
            let _ = agent(&xml);
            let _ = arriving(&xml);
        }

        #[test]
        fn damaged_xml_is_read_or_refused(at in 0..XML.len(), byte in 0x20_u8..0x7f) {
            let mut xml = XML.as_bytes().to_vec();
            xml[at] = byte;
            let xml = String::from_utf8(xml).unwrap();
            let _ = agent(&xml);
            let _ = arriving(&xml);
        }

        #[test]
        fn truncated_xml_is_refused(at in 0..XML.len() - 1) {
            prop_assert!(arriving(&XML[..at]).is_err());
        }
    }
}
