//! Evaluates `SystemCallFilter=`.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::Unit;

/// Group that systemd always permits.
const ALWAYS: &str = "@default";

/// Groups of system calls by name (such as `@network-io`), from systemd.
struct Groups(BTreeMap<String, Vec<String>>);

/// Returns the system calls that a unit permits; `None` if it permits all.
pub(super) fn permitted(unit: &Unit) -> Result<Option<BTreeSet<String>>> {
    let values = unit.values("SystemCallFilter");
    if values.is_empty() {
        return Ok(None);
    }
    let output = Command::new("systemd-analyze")
        .args(["--no-pager", "syscall-filter"])
        .output()
        .context("Cannot run systemd-analyze: install systemd")?;
    ensure!(
        output.status.success(),
        "systemd-analyze failed: {output:?}"
    );
    let groups = Groups::parse(&String::from_utf8_lossy(&output.stdout));
    Ok(Some(groups.permitted(&values)?))
}

impl Groups {
    fn parse(text: &str) -> Self {
        let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut group = None;
        for line in text.lines() {
            let word = line.trim();
            if word.is_empty() || word.starts_with('#') {
                continue;
            }
            if line.starts_with('@') {
                group = Some(groups.entry(word.to_owned()).or_default());
            } else if let Some(members) = &mut group {
                members.push(word.to_owned());
            }
        }
        Self(groups)
    }

    /// Evaluates values as systemd does: the first value must list permitted calls, and a value
    /// that begins with `~` removes calls.
    fn permitted(&self, values: &[&str]) -> Result<BTreeSet<String>> {
        let first = values.first().copied().unwrap_or_default();
        ensure!(
            !first.starts_with('~'),
            "The filter of system calls is no list of what is permitted"
        );
        let mut permitted = BTreeSet::new();
        self.add(ALWAYS, &mut permitted)?;
        for value in values {
            let (words, takes_away) = match value.strip_prefix('~') {
                Some(words) => (words, true),
                None => (*value, false),
            };
            let mut calls = BTreeSet::new();
            for word in words.split_whitespace() {
                self.add(word, &mut calls)?;
            }
            if takes_away {
                permitted.retain(|call| !calls.contains(call));
            } else {
                permitted.append(&mut calls);
            }
        }
        Ok(permitted)
    }

    fn add(&self, word: &str, calls: &mut BTreeSet<String>) -> Result<()> {
        if !word.starts_with('@') {
            calls.insert(word.to_owned());
            return Ok(());
        }
        let members = self.0.get(word);
        for member in members.with_context(|| format!("There is no group {word}"))? {
            self.add(member, calls)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "@default\n    # Always\n    exit\n\n@file\n    # Files\n    open\n    @more\n\
                        @more\n    chown\n\n# Unlisted\n#   bpf\n";

    #[test]
    fn groups_are_added_and_taken_away_in_their_order() {
        let groups = Groups::parse(TEXT);
        let permitted = |values: &[&str]| {
            let calls = groups.permitted(values).unwrap();
            calls.into_iter().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(permitted(&["@file"]), "chown exit open");
        assert_eq!(permitted(&["@file", "~@more", "bpf"]), "bpf exit open");
        assert_eq!(permitted(&["@file bpf", "~bpf open"]), "chown exit");
        assert!(groups.permitted(&["@none"]).is_err());
        assert!(groups.permitted(&["~open"]).is_err());
    }
}
