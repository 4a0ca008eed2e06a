//! QEMU of the host machine: command line, start, and end together with this process.

use std::ffi::OsString;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result};

use super::image::Image;
use super::wire::PORT_NAME;
use super::{Machine, OUTER_TAG, OUTPUT_TAG};

/// A running QEMU, which ends when this value is dropped or this process ends.
pub(super) struct Qemu {
    child: Child,
}

/// Pipes and sockets to QEMU.
pub(super) struct Channels {
    /// The machine's virtio-serial port.
    pub(super) port: UnixStream,
    /// The serial console.
    pub(super) console: ChildStdout,
    /// QEMU's own messages.
    pub(super) errors: ChildStderr,
}

impl Qemu {
    /// Starts QEMU. `next` is the program to which `init.sh` hands over.
    pub(super) fn start(machine: &Machine, image: &Image, next: &Path) -> Result<(Self, Channels)> {
        let (port, other_end) = UnixStream::pair().context("Cannot make a pair of sockets")?;
        // Standard input carries the port and standard output the console, so that no file remains
        // on this machine, however this process ends. QEMU opens standard output below /proc: where
        // /dev/stdout is missing, QEMU would create a file of that name.
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(arguments(machine, image, next))
            .stdin(OwnedFd::from(other_end))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C must reach only this process. QEMU ends when this process ends.
            .process_group(0)
            .spawn()
            .context("Cannot start QEMU by setpriv; install qemu-system-x86 and util-linux")?;
        let console = child.stdout.take();
        let errors = child.stderr.take();
        let qemu = Self { child };
        Ok((
            qemu,
            Channels {
                port,
                console: console.context("QEMU has no standard output")?,
                errors: errors.context("QEMU has no standard error")?,
            },
        ))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn arguments(machine: &Machine, image: &Image, next: &Path) -> Vec<OsString> {
    let threads = if machine.cpus == 1 { "single" } else { "multi" };
    let mut words: Vec<OsString> = format!(
        "-accel tcg,thread={threads} -cpu max,vendor=AuthenticAMD -smp {} -m {} -machine q35 \
         -nodefaults -no-reboot -display none -device virtio-rng-pci \
         -chardev file,id=console,path=/proc/self/fd/1 -serial chardev:console \
         -device virtio-serial-pci -chardev socket,id=port,fd=0 \
         -device virtserialport,chardev=port,name={PORT_NAME}",
        machine.cpus, machine.memory_mib
    )
    .split_whitespace()
    .map(Into::into)
    .collect();
    let mut add = |option: &str, value: OsString| words.extend([option.into(), value]);
    add("-kernel", image.kernel.image.clone().into());
    add("-initrd", image.initrd.clone().into());
    add(
        "-append",
        format!(
            "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on next={}",
            next.display()
        )
        .into(),
    );
    add(
        "-virtfs",
        format!(
            "local,path=/,mount_tag={OUTER_TAG},security_model=none,readonly=on,multidevs=remap"
        )
        .into(),
    );
    if let Some(output) = &machine.output {
        add(
            "-virtfs",
            format!(
                "local,path={},mount_tag={OUTPUT_TAG},security_model=none",
                escaped(output)
            )
            .into(),
        );
    }
    words
}

/// Escapes a path for an option of QEMU, in which a single comma begins the next key.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// Last output of the console and of QEMU itself.
#[derive(Debug, Default)]
pub(super) struct Tail {
    bytes: Vec<u8>,
}

impl Tail {
    /// Number of bytes to keep.
    const LIMIT: usize = 64 * 1024;
    /// Number of lines to show.
    const LINES: usize = 15;

    /// Adds output and discards the oldest bytes above [`Tail::LIMIT`].
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        let excess = self.bytes.len().saturating_sub(Self::LIMIT);
        self.bytes.drain(..excess);
    }

    /// Returns the last lines as a paragraph.
    pub(super) fn shown(&self) -> String {
        let lines = self.lines();
        let last = lines.get(lines.len().saturating_sub(Self::LINES)..);
        match last {
            Some(lines @ [_, ..]) => {
                format!("; its console's last lines:\n    {}", lines.join("\n    "))
            }
            _ => "; its console is empty".to_owned(),
        }
    }

    /// Returns the kernel's panic message, if there is one.
    pub(super) fn panic(&self) -> Option<String> {
        let said = "Kernel panic - not syncing";
        let mut lines = self.lines().into_iter();
        lines.find_map(|line| Some(line.get(line.find(said)?..)?.to_owned()))
    }

    /// Returns the lines that are not empty, without control sequences of a terminal.
    fn lines(&self) -> Vec<String> {
        String::from_utf8_lossy(&self.bytes)
            .lines()
            .map(|line| {
                line.chars()
                    .filter(|character| !character.is_control())
                    .collect::<String>()
            })
            .filter(|line| !line.trim().is_empty())
            .collect()
    }
}

/// Reads `from` to its end and passes the bytes to `take`.
pub(super) fn read_all(mut from: impl Read, mut take: impl FnMut(&[u8])) {
    let mut chunk = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut chunk) {
        take(chunk.get(..length).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::kernel::Kernel;

    fn words(cpus: u32, output: Option<&str>) -> Vec<String> {
        let machine = Machine {
            kernel: "6.1".to_owned(),
            cpus,
            memory_mib: 4096,
            timeout: Duration::from_secs(1),
            output: output.map(Into::into),
        };
        let image = Image {
            kernel: Kernel {
                release: "6.1".to_owned(),
                image: "/k/vmlinuz".into(),
                modules: "/k/modules".into(),
            },
            initrd: "/k/initrd".into(),
        };
        arguments(&machine, &image, Path::new("/t/machine-init"))
            .into_iter()
            .map(|word| word.into_string().unwrap())
            .collect()
    }

    #[test]
    fn the_outer_file_system_is_read_only() {
        let words = words(1, None);
        let shares: Vec<_> = words
            .iter()
            .filter(|word| word.contains("path=/,"))
            .collect();
        assert_eq!(shares.len(), 1);
        assert!(shares[0].contains("readonly=on"), "{shares:?}");
        assert!(!words.iter().any(|word| word.contains(OUTPUT_TAG)));
    }

    #[test]
    fn a_comma_in_the_output_directory_begins_no_option() {
        let words = words(1, Some("/a,readonly=on"));
        assert!(
            words
                .iter()
                .any(|word| word.contains("path=/a,,readonly=on,mount_tag=output")),
            "{words:?}"
        );
    }

    #[test]
    fn only_several_processors_run_in_several_threads() {
        assert!(words(1, None).contains(&"tcg,thread=single".to_owned()));
        assert!(words(2, None).contains(&"tcg,thread=multi".to_owned()));
    }

    #[test]
    fn tail_is_the_last_lines_without_control_characters() {
        let mut tail = Tail::default();
        assert!(tail.shown().contains("is empty"));
        for number in 0..20_000 {
            tail.push(format!("\x1b[2Jline {number}\r\n\n").as_bytes());
        }
        let shown = tail.shown();
        assert_eq!(shown.lines().count(), 1 + Tail::LINES, "{shown}");
        assert!(shown.ends_with("\n    [2Jline 19999"), "{shown}");
    }

    #[test]
    fn panic_is_found_however_much_follows() {
        let mut tail = Tail::default();
        tail.push(b"[    8.5] Kernel panic - not syncing: no init\r\n");
        for number in 0..100 {
            tail.push(format!("[    8.6] frame {number}\r\n").as_bytes());
        }
        assert_eq!(
            tail.panic().as_deref(),
            Some("Kernel panic - not syncing: no init")
        );
        assert_eq!(Tail::default().panic(), None);
    }
}
