//! The host machine: a command inside runs as outside, and failures are reported.

#![allow(
    clippy::unwrap_used,
    reason = "a test panics rather than returning an error"
)]

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use lab::machine::wire::FromMachine;
use lab::machine::{Command, Machine, environment};

const KERNEL: &str = "6.12";

fn machine(timeout: Duration, output: Option<PathBuf>) -> Machine {
    Machine {
        kernel: KERNEL.to_owned(),
        cpus: 1,
        memory_mib: 1024,
        timeout,
        output,
    }
}

fn shell(script: &str) -> Command {
    Command {
        words: ["bash", "-c", script].map(str::to_owned).to_vec(),
        directory: "/usr".into(),
        environment: environment(),
        terminal: None,
    }
}

#[test]
fn output_errors_exit_code_and_files_come_back() {
    if !lab::requirements::met() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let machine = machine(
        Duration::from_secs(300),
        Some(directory.path().to_path_buf()),
    );
    let script = r#"
        uname -r; pwd; echo to errors >&2; id -u > "$ROAMCAST_MACHINE_OUTPUT/file"
        touch /usr/here-only; test "$ROAMCAST_MACHINE" = 1 && test -c /dev/kvm && exit 3"#;
    let (mut output, mut errors) = (Vec::new(), Vec::new());
    let code = machine
        .run(&shell(script), None, |message| {
            match message {
                FromMachine::Output(bytes) => output.extend(bytes),
                FromMachine::Errors(bytes) => errors.extend(bytes),
                _ => {}
            }
            Ok(())
        })
        .unwrap();
    let output = String::from_utf8(output).unwrap();
    assert!(output.starts_with("6.12."), "{output}");
    assert!(output.ends_with("\n/usr\n"), "{output}");
    assert_eq!(String::from_utf8(errors).unwrap(), "to errors\n");
    assert_eq!(
        fs::read_to_string(directory.path().join("file")).unwrap(),
        "0\n"
    );
    assert!(!fs::exists("/usr/here-only").unwrap());
    assert_eq!(code, 3);
}

#[test]
fn command_that_hangs_is_killed_with_its_machine() {
    if !lab::requirements::met() {
        return;
    }
    let machine = machine(Duration::from_secs(2), None);
    let error = machine
        .run(&shell("sleep infinity"), None, |_| Ok(()))
        .unwrap_err();
    assert!(
        error.to_string().contains("did not finish within 2 s"),
        "{error}"
    );
}

#[test]
fn kernel_panic_is_told_with_the_consoles_last_lines() {
    if !lab::requirements::met() {
        return;
    }
    let machine = machine(Duration::from_secs(300), None);
    let error = machine
        .run(&shell("echo c > /proc/sysrq-trigger"), None, |_| Ok(()))
        .unwrap_err();
    let error = error.to_string();
    assert!(error.contains("ended without an exit code"), "{error}");
    assert!(error.contains("Kernel panic"), "{error}");
}
