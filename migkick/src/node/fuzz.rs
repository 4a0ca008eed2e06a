//! Fuzz targets of the node: its files, its control socket and its protocol.

use std::path::Path;

use super::config::Config;
use super::control::{Answer, Request};
use super::core::Saved;

pub(crate) use super::core::fuzz::run;

/// A key file, and the saved state.
pub(crate) fn key_file(bytes: &[u8]) {
    let saved = serde_json::from_slice::<Saved>(bytes);
    if let Ok(saved) = saved {
        let text = serde_json::to_vec(&saved).unwrap_or_default();
        assert_eq!(serde_json::from_slice::<Saved>(&text).ok(), Some(saved));
    }
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    match Config::parse(Path::new("node.toml"), text) {
        Ok(config) => {
            let identity = config.identity;
            assert!(super::config::contains(identity.home, identity.hoa));
            assert!((1..=8).contains(&identity.servers.len()));
        }
        Err(error) => {
            // An error must not show the digits of the key.
            let shown = error.to_string();
            let key = text
                .lines()
                .find_map(|line| line.strip_prefix("key = \"")?.strip_suffix('"'))
                .filter(|key| key.len() == 64 && text.matches(key).count() == 1);
            assert!(key.is_none_or(|key| !shown.contains(key)), "{shown}");
        }
    }
}

/// A line on the control socket, as request and as answer.
pub(crate) fn control(bytes: &[u8]) {
    if let Ok(request) = serde_json::from_slice::<Request>(bytes) {
        let line = serde_json::to_vec(&request).unwrap_or_default();
        assert_eq!(serde_json::from_slice(&line).ok(), Some(request));
    }
    if let Ok(answer) = serde_json::from_slice::<Answer>(bytes) {
        let line = serde_json::to_vec(&answer).unwrap_or_default();
        assert_eq!(serde_json::from_slice(&line).ok(), Some(answer));
    }
}
