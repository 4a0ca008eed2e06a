//! Files, and what operators, libvirt and session descriptions say.

use std::path::Path;
use std::str;

use common::text::{Escaped, is_plain_text};

use crate::config::{Config, ImsConfig, McsConfig, RelayConfig};
use crate::control::Reply;
use crate::control::request::{self, MAX_REQUEST_BYTES, decode};
use crate::glob::Glob;
use crate::hypervisor::{domain_xml as nics, metadata};
use crate::net::relays;
use crate::proto::DomainUuid;
use crate::runtime::ims::secret;
use crate::value::Prefix;

/// A configuration of the kind that the first byte names.
pub(super) fn config(bytes: &[u8]) {
    let Some((kind, Ok(text))) = split(bytes) else {
        return;
    };
    let path = Path::new("x.toml");
    let error = match kind % 4 {
        0 => Config::parse(text, path).err(),
        1 => RelayConfig::parse(text, path).err(),
        2 => McsConfig::parse(text, path).err(),
        _ => ImsConfig::parse(text, path).err(),
    };
    let Some(error) = error else { return };
    let error = error.to_string();
    let line = error
        .strip_prefix("x.toml:")
        .and_then(|rest| rest.split_once(": "))
        .and_then(|(line, _)| line.parse::<usize>().ok())
        .expect("the error names its line");
    assert!((1..=text.split('\n').count()).contains(&line), "{error}");
}

fn split(bytes: &[u8]) -> Option<(u8, Result<&str, str::Utf8Error>)> {
    let (kind, text) = bytes.split_first()?;
    Some((*kind, str::from_utf8(text)))
}

/// A session description.
pub(super) fn sdp(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    let Ok(found) = relays::parse(text, "x.sdp") else {
        return;
    };
    assert!(!found.is_empty());
    for (name, address) in found {
        assert!(is_plain_text(&name) && !name.contains(' '), "{name:?}");
        let again = format!("a=x-roamcast-relay:{name} {address}\n");
        let again = relays::parse(&again, "x.sdp").expect("what was found is found again");
        assert_eq!(again, [(name, address)]);
    }
}

/// libvirt's XML of a domain.
pub(super) fn domain_xml(bytes: &[u8]) {
    let Some((kind, Ok(xml))) = split(bytes) else {
        return;
    };
    if let Ok(found) = nics::interfaces(xml, "br0", kind & 1 == 0) {
        assert!(found.iter().all(|nic| nic.target_dev.len() <= 15));
    }
    let Ok(arriving) = metadata::arriving(xml) else {
        return;
    };
    assert!(!arriving.name.is_empty());
    assert_eq!(metadata::agent(xml), Ok(arriving.agent.clone()));
    if let Some(agent) = arriving.agent {
        let uri = metadata::URI;
        let element = metadata::element(&agent).replace("<agent", &format!("<agent xmlns='{uri}'"));
        let again = format!("<domain><metadata>{element}</metadata></domain>");
        assert_eq!(metadata::agent(&again), Ok(Some(agent)));
    }
}

/// Decodes a request to a role. What was decoded is the same after it was written.
fn read_again<R>(bytes: &[u8]) -> Option<R>
where
    R: request::Request + serde::Serialize + PartialEq + std::fmt::Debug,
{
    let request: R = decode(bytes).ok()?;
    let line = serde_json::to_vec(&request).expect("can be written");
    // Escapes may make it longer than a request may be.
    if line.len() < MAX_REQUEST_BYTES {
        assert_eq!(decode::<R>(&line).as_ref(), Ok(&request));
    }
    Some(request)
}

/// A line on the operator's socket, from either side.
pub(super) fn control(bytes: &[u8]) {
    if let Some(request) = read_again::<request::Agent>(bytes) {
        let _ = request.command();
    }
    read_again::<request::Relay>(bytes);
    read_again::<request::Mcs>(bytes);
    read_again::<request::Ims>(bytes);
    if let Ok(reply) = serde_json::from_slice::<Reply>(bytes) {
        let line = serde_json::to_vec(&reply).expect("can be written");
        let again: Reply = serde_json::from_slice(&line).expect("can be read");
        assert_eq!(again, reply);
    }
}

/// What stands in files and commands: patterns, prefixes, UUIDs, keys, and text to be shown.
pub(super) fn names(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    assert!(is_plain_text(&Escaped(text).to_string()));
    if let Ok(uuid) = text.parse::<DomainUuid>() {
        assert_eq!(uuid.to_string(), text.to_lowercase());
    }
    if let Ok(prefix) = Prefix::try_from(text.to_owned()) {
        assert_eq!(Prefix::try_from(prefix.to_string()), Ok(prefix));
    }
    if let Some(secret) = secret::parse(text) {
        assert_eq!(secret::hex(&secret), text.to_lowercase());
    }
    let Some((pattern, name)) = text.split_once('\n') else {
        return;
    };
    if let Ok(glob) = Glob::try_from(pattern) {
        let letters = |text: &str| text.chars().take(12).collect::<Vec<_>>();
        if pattern.chars().count() <= 12 && name.chars().count() <= 12 {
            let expected = matches(&letters(pattern), &letters(name));
            assert_eq!(glob.matches(name), expected);
        } else {
            glob.matches(name);
        }
    }
}

/// What a pattern matches, as one would explain it.
fn matches(pattern: &[char], name: &[char]) -> bool {
    match (pattern, name) {
        ([], []) => true,
        (['*', rest @ ..], _) => (0..=name.len()).any(|taken| matches(rest, &name[taken..])),
        (['?', pattern @ ..], [_, name @ ..]) => matches(pattern, name),
        ([a, pattern @ ..], [b, name @ ..]) => a == b && matches(pattern, name),
        _ => false,
    }
}
