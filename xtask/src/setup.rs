//! `cargo xtask setup`: brings a Debian 12 machine with rustup to the point where everything
//! builds and runs.
//!
//! | step | installs |
//! |---|---|
//! | [`packages`] | Debian packages, with backports as an apt source if there is none |
//! | [`toolchain`] | a Rust toolchain that can build for the BPF target, rustfmt, clippy, bpf-linker, cargo-deny |
//!
//! Each step looks first and does nothing when all is there. On another system the packages are
//! only named.

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

/// Options of `cargo xtask setup`.
#[derive(Debug, Default, Args)]
pub(crate) struct Arguments {
    /// Only list what would be installed, and why
    #[arg(long)]
    dry_run: bool,
    /// Say nothing when everything is there
    #[arg(skip)]
    quiet: bool,
}

/// Something to install.
#[derive(Debug)]
struct Step {
    /// What and why, one line.
    summary: String,
    /// Commands in their order: what is being done, and how.
    commands: Vec<(String, Command)>,
}

/// Runs the set-up as the first part of another verb; in the host machine all is there already.
///
/// # Errors
///
/// As [`run`].
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
/// When something can't be installed; the text has the command that failed and its last words.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut missing = 0;
    // A later step may need what an earlier one installs, so each is looked at when it is its turn.
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

/// The command as one would type it.
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

/// A word as the shell wants it.
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

/// Runs one command behind a spinner; what it prints is shown only when it fails.
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
