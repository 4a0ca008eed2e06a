//! Exposure of each unit according to `systemd-analyze security`.

use std::process::Command;

use super::systemd::{known, unit};

/// Units with the upper limit of their exposure, in tenths.
const PROMISED: [(&str, u32); 5] = [
    ("roamcast", 30),
    ("roamcast-relay", 25),
    ("roamcast-mcs", 15),
    ("roamcast-ims", 15),
    ("migkick-node", 35),
];

#[test]
fn exposure_of_each_unit_is_at_most_what_is_promised() {
    if !known() {
        return;
    }
    for (name, promised) in PROMISED {
        let output = Command::new("systemd-analyze")
            .args(["security", "--no-pager", "--offline=true"])
            .arg(format!("--threshold={promised}"))
            .arg(unit(name))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let line = said.lines().last().unwrap_or_default();
        println!("{name}: at most {promised} tenths; {line}");
        assert!(line.contains("exposure level"), "{name}: {output:?}");
        // The command fails if the exposure exceeds the threshold.
        assert!(output.status.success(), "{said}");
    }
}

#[test]
fn every_role_has_a_watchdog_limits_and_no_more_capabilities_than_its_comment_names() {
    for (name, _) in PROMISED {
        let text = std::fs::read_to_string(unit(name)).unwrap();
        let settings = lab::confine::Unit::parse(&text);
        for key in ["WatchdogSec", "MemoryMax", "TasksMax", "SystemCallFilter"] {
            assert!(settings.last(key).is_some(), "{name}: no {key}");
        }
        let comments: String = text.lines().filter(|it| it.starts_with('#')).collect();
        for capability in settings.words("CapabilityBoundingSet") {
            let short = capability.trim_start_matches("CAP_");
            assert!(comments.contains(short), "{name}: why {capability}?");
        }
    }
}
