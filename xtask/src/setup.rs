//! `cargo xtask setup`: installs on Debian 12 with rustup what building and running needs.
//!
//! | step | installs |
//! |---|---|
//! | [`packages`] | Debian packages, with backports as an apt source if there is none |
//! | [`toolchain`] | a Rust toolchain that can build for the BPF target, rustfmt, clippy, bpf-linker, cargo-deny |
//!
//! Each step checks first and does nothing if everything is installed. On another system the
//! command only lists the packages.

mod packages;
mod toolchain;

use std::ffi::OsStr;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use lab::guest::image;
use lab::machine;

/// Printed before the first installation.
const FRESH_MACHINE: &str = "Installs what is missing. On a fresh machine with two processors all of it takes about ten minutes.";

/// Options of `cargo xtask setup`.
#[derive(Debug, Default, Args)]
pub(crate) struct Arguments {
    /// Only list what the command would install, and why
    #[arg(long)]
    dry_run: bool,
    /// Print nothing if everything is installed
    #[arg(skip)]
    quiet: bool,
}

/// An installation step.
#[derive(Debug)]
struct Step {
    /// What the step installs and why, in one line.
    summary: String,
    /// Commands in order, each with a title.
    commands: Vec<(String, Command)>,
}

/// Installs what is missing, as the first part of another verb. Does nothing in the host machine,
/// where everything is installed.
///
/// # Errors
///
/// As for [`run`].
pub(crate) fn ensure() -> Result<()> {
    if machine::inside() {
        return Ok(());
    }
    run(&Arguments {
        dry_run: false,
        quiet: true,
    })
}

/// Installs what is missing.
///
/// # Errors
///
/// An installation failed; the text has the failed command and its last output.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut missing = 0;
    // A later step may need what an earlier one installs, so each step checks when its turn comes.
    let steps: [fn() -> Result<Option<Step>>; 6] = [
        packages::source,
        packages::packages,
        toolchain::host,
        toolchain::bpf,
        toolchain::linker,
        toolchain::deny,
    ];
    for step in steps {
        let Some(step) = step()? else { continue };
        if missing == 0 && !arguments.dry_run {
            println!("{FRESH_MACHINE}");
        }
        missing += 1;
        println!("{}", step.summary);
        for (label, mut command) in step.commands {
            if arguments.dry_run {
                println!("    {}", shown(&command));
            } else {
                run_step(&label, &mut command)?;
            }
        }
    }
    if !arguments.dry_run {
        guest_image()?;
    }
    if missing == 0 && !arguments.quiet {
        println!("Everything is installed. {}", toolchain::chosen());
    }
    Ok(())
}

/// Builds the guest's kernel and initramfs unless they are up to date.
fn guest_image() -> Result<()> {
    let directory = image::default_directory();
    let what = "guest image: checked, or built where something has changed";
    eprintln!("==> {what}");
    let spinner = spinner(what);
    let image = image::ensure(&directory);
    spinner.finish_and_clear();
    image.map(|_| ()).context("Failed to build the guest image")
}

/// Returns the command as a person would type it.
fn shown(command: &Command) -> String {
    let variables = command
        .get_envs()
        .filter_map(|(key, value)| Some(format!("{}={}", key.display(), quoted(value?))));
    std::iter::empty()
        .chain(variables)
        .chain([quoted(command.get_program())])
        .chain(command.get_args().map(quoted))
        .collect::<Vec<_>>()
        .join(" ")
}

/// Quotes a word for the shell.
fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_=+./:,@%".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

fn spinner(label: &str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(label.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} [{elapsed}]") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

/// Runs one command behind a spinner. Shows the output only if the command fails.
fn run_step(label: &str, command: &mut Command) -> Result<()> {
    let spinner = spinner(label);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("Failed to run {}", command.get_program().display()))?;
    spinner.finish_and_clear();
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said: Vec<&str> = said.lines().collect();
        let last = said
            .get(said.len().saturating_sub(15)..)
            .unwrap_or_default()
            .join("\n");
        bail!(
            "{label}: `{}` failed with {}:\n{last}",
            shown(command),
            output.status
        );
    }
    println!("  done: {label} ({:.0?})", spinner.elapsed());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_shown_as_they_can_be_typed() {
        let mut command = Command::new("sh");
        command
            .args(["-c", "it's a \"test\"", "plain"])
            .env("KEY", "two words");
        assert_eq!(
            shown(&command),
            r#"KEY='two words' sh -c 'it'\''s a "test"' plain"#
        );
    }
}
