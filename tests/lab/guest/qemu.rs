//! A guest under plain QEMU, for tests that need no libvirt.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    domain::{Accelerator, MACHINE, mac_text},
    image::{COMMAND_LINE, Image},
    wire::PORT_NAME,
};
use crate::wait;

/// Parameters of a guest.
#[derive(Clone, Debug)]
pub struct QemuConfig {
    /// Kernel and initramfs.
    pub image: Image,
    /// KVM or TCG.
    pub accelerator: Accelerator,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Existing TAPs, each with the MAC address of its NIC.
    pub taps: Vec<(String, [u8; 6])>,
    /// Path of the control channel's socket, to which QEMU connects.
    pub control: PathBuf,
    /// Directory for the monitor socket and the serial console's log.
    pub directory: PathBuf,
    /// Name, from which the names of the files in `directory` follow.
    pub name: String,
    /// Migration URI on which QEMU waits for a guest, e.g. `unix:/tmp/x`. With `None` QEMU boots a
    /// guest.
    pub incoming: Option<String>,
}

/// A running QEMU. The drop of this value kills QEMU.
pub struct Qemu {
    child: Child,
    monitor: PathBuf,
}

impl Qemu {
    /// Starts QEMU. Its command line is appended to `launcher`, e.g. `ip netns exec NAME`.
    ///
    /// # Errors
    ///
    /// When QEMU cannot be started or does not open its monitor.
    pub fn start(launcher: &[&str], config: &QemuConfig) -> Result<Self> {
        let monitor = config.directory.join(format!("{}.qmp", config.name));
        let _ = std::fs::remove_file(&monitor);
        let mut words: Vec<String> = launcher.iter().map(|word| (*word).to_owned()).collect();
        words.extend(arguments(config, &monitor));
        let (program, args) = words.split_first().context("There is no command to run")?;
        let log = config.directory.join(format!("{}.log", config.name));
        let log_file = File::create(&log)?;
        let mut child = Command::new(program)
            .args(args)
            .stdin(std::process::Stdio::null())
            .stdout(log_file.try_clone()?)
            .stderr(log_file)
            .spawn()
            .context("Cannot start QEMU")?;
        let deadline = wait::end_after(Duration::from_secs(20));
        while UnixStream::connect(&monitor).is_err() {
            let has_ended = child.try_wait()?.is_some();
            ensure!(
                !has_ended && Instant::now() < deadline,
                "QEMU does not open its monitor: {}",
                std::fs::read_to_string(&log).unwrap_or_default().trim()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Self { child, monitor })
    }

    /// Runs one QMP command and returns its answer.
    ///
    /// # Errors
    ///
    /// When the monitor is gone, or the answer is an error.
    pub fn qmp(&self, execute: &str, arguments: serde_json::Value) -> Result<serde_json::Value> {
        let stream = UnixStream::connect(&self.monitor).context("QEMU's monitor is gone")?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let mut stream = stream;
        let mut answer = serde_json::Value::Null;
        for (command, arguments) in [
            ("qmp_capabilities", serde_json::json!({})),
            (execute, arguments),
        ] {
            let message = serde_json::json!({"execute": command, "arguments": arguments});
            stream.write_all(message.to_string().as_bytes())?;
            answer = loop {
                let line = lines.next().context("QEMU's monitor ended")??;
                let value: serde_json::Value = serde_json::from_str(&line)?;
                ensure!(
                    value.get("error").is_none(),
                    "QEMU refuses {command}: {value}"
                );
                if let Some(answer) = value.get("return") {
                    break answer.clone();
                }
            };
        }
        Ok(answer)
    }

    /// Migrates the guest to the QEMU that waits on `uri`, by precopy. Returns after the migration.
    ///
    /// # Errors
    ///
    /// When the migration fails or takes longer than `deadline`.
    pub fn migrate(&self, uri: &str, deadline: Duration) -> Result<()> {
        self.qmp("migrate", serde_json::json!({ "uri": uri }))?;
        let deadline = wait::end_after(deadline);
        loop {
            let state = self.qmp("query-migrate", serde_json::json!({}))?;
            let status = state
                .get("status")
                .and_then(serde_json::Value::as_str)
                .unwrap_or("");
            if status == "completed" {
                return Ok(());
            }
            ensure!(
                !["failed", "cancelled"].contains(&status),
                "The migration ended as {state}"
            );
            ensure!(
                Instant::now() < deadline,
                "The migration takes too long: {state}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn arguments(config: &QemuConfig, monitor: &Path) -> Vec<String> {
    let serial = config.directory.join(format!("{}-serial.log", config.name));
    let (accelerator, cpu) = match config.accelerator {
        Accelerator::Kvm => ("kvm", "host"),
        Accelerator::Tcg => ("tcg", "qemu64,+rdrand"),
    };
    let mut text = format!(
        "qemu-system-x86_64 -accel {accelerator} -cpu {cpu} -machine {MACHINE},usb=off -nodefaults \
         -display none -m {} -device virtio-serial-pci -no-reboot -net none",
        config.memory_mib
    )
    .split_whitespace()
    .map(str::to_owned)
    .collect::<Vec<_>>();
    let mut add = |option: &str, value: String| text.extend([option.to_owned(), value]);
    add("-kernel", config.image.kernel.display().to_string());
    add("-initrd", config.image.initrd.display().to_string());
    add("-append", COMMAND_LINE.to_owned());
    add(
        "-chardev",
        format!("file,id=serial,path={},append=on", serial.display()),
    );
    add("-serial", "chardev:serial".to_owned());
    let control = config.control.display();
    add(
        "-chardev",
        format!("socket,id=control,path={control},reconnect-ms=1000"),
    );
    add(
        "-device",
        format!("virtserialport,chardev=control,name={PORT_NAME}"),
    );
    add(
        "-qmp",
        format!("unix:{},server=on,wait=off", monitor.display()),
    );
    for (index, (tap, mac)) in config.taps.iter().enumerate() {
        add(
            "-netdev",
            format!("tap,id=nic{index},ifname={tap},script=no,downscript=no"),
        );
        let mac = mac_text(*mac);
        add(
            "-device",
            format!("virtio-net-pci,netdev=nic{index},mac={mac},romfile="),
        );
    }
    if let Some(uri) = &config.incoming {
        add("-incoming", uri.clone());
    }
    text
}
