//! libvirt domain XML of the lab's guests.
//!
//! Both VM hosts define the domain by the same XML. The domain therefore has no disk, no path that
//! exists on one host only, a pinned machine type, and a CPU model that can migrate. libvirt
//! chooses the TAP names, because they differ on the two hosts.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
};

use super::{
    image::{COMMAND_LINE, Image},
    wire::PORT_NAME,
};

/// Machine type, which the oldest supported QEMU and every newer QEMU have.
pub const MACHINE: &str = "pc-i440fx-7.2";

/// Directory on the VM hosts in which QEMU finds the sockets of the guests' control channels.
pub const SOCKET_DIRECTORY: &str = "/run/roamcast-lab";

/// Virtualization of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// KVM, by the processor.
    Kvm,
    /// TCG, QEMU's translator.
    Tcg,
}

impl Accelerator {
    /// Returns the name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// Limits of a NIC (libvirt's `<bandwidth>`), averages in KiB/s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bandwidth {
    /// Rate towards the VM.
    pub inbound: u32,
    /// Rate from the VM.
    pub outbound: u32,
}

/// Queues of a NIC's TAP, and the reader of the TAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NicDriver {
    /// Queues of the TAP. The guest has as many CPUs, because Linux uses one queue for each CPU.
    pub queues: u8,
    /// True if QEMU itself reads the TAP, even if vhost-net is available.
    pub without_vhost: bool,
}

impl NicDriver {
    /// libvirt's choice: one queue, and vhost-net with KVM.
    pub const DEFAULT: Self = Self {
        queues: 1,
        without_vhost: false,
    };

    fn xml(self) -> String {
        let name = if self.without_vhost {
            " name='qemu'"
        } else {
            ""
        };
        match self.queues {
            0 | 1 if name.is_empty() => String::new(),
            queues => format!("\n      <driver{name} queues='{}'/>", queues.max(1)),
        }
    }
}

/// Settings that differ between domains.
#[derive(Clone, Debug)]
pub struct DomainConfig {
    /// Name of the domain, also part of the names of the socket and the log.
    pub name: String,
    /// UUID in its 36-character form.
    pub uuid: String,
    /// Memory in MiB; a guest with less than 96 does not boot.
    pub memory_mib: u32,
    /// Kernel and initramfs, at the same path on both VM hosts.
    pub image: Image,
    /// Addition to the kernel's command line.
    pub command_line: String,
    /// KVM or TCG.
    pub accelerator: Accelerator,
    /// Bridge of the VM hosts to which the NICs are attached.
    pub bridge: String,
    /// MAC addresses of the NICs, in the order eth0, eth1.
    pub macs: Vec<[u8; 6]>,
    /// Limits of every NIC; `None` for no limits.
    pub bandwidth: Option<Bandwidth>,
    /// Queues and reader of every NIC.
    pub driver: NicDriver,
    /// Directory for the serial console's log, existing on both VM hosts.
    pub log_directory: PathBuf,
}

impl DomainConfig {
    /// Returns the config of the `index`-th guest, whose name, UUID and MACs follow from the index.
    pub fn numbered(index: u8, image: Image, accelerator: Accelerator) -> Self {
        Self {
            name: format!("guest{index}"),
            uuid: format!("5c3f9b1e-6d0a-4e57-9a34-0000000000{index:02x}"),
            memory_mib: 128,
            image,
            command_line: String::new(),
            accelerator,
            bridge: "br0".to_owned(),
            macs: (0..2)
                .map(|nic| [0x52, 0x54, 0x00, 0x4d, index, nic])
                .collect(),
            bandwidth: None,
            driver: NicDriver::DEFAULT,
            log_directory: PathBuf::from("/var/log/libvirt/qemu"),
        }
    }

    /// Returns the file name of the control channel's socket within a VM host's socket directory.
    pub fn socket_name(&self) -> String {
        format!("guest-{}.sock", self.name)
    }
}

/// Returns the domain XML.
pub fn xml(config: &DomainConfig) -> String {
    let (kind, cpu) = match config.accelerator {
        Accelerator::Kvm => ("kvm", "<cpu mode='host-model'/>"),
        // Without RDRAND the guest would wait seconds for entropy.
        Accelerator::Tcg => (
            "qemu",
            "<cpu mode='custom' match='exact' check='none'><model>qemu64</model>\
             <feature policy='require' name='rdrand'/></cpu>",
        ),
    };
    let bandwidth = config.bandwidth.map_or_else(String::new, |limits| {
        format!(
            "
      <bandwidth><inbound average='{}'/><outbound average='{}'/></bandwidth>",
            limits.inbound, limits.outbound
        )
    });
    let driver = config.driver.xml();
    let cpus = config.driver.queues.max(1);
    let mut nics = String::new();
    for mac in &config.macs {
        let _ = write!(
            nics,
            "
    <interface type='bridge'>
      <mac address='{}'/>
      <source bridge='{}'/>
      <model type='virtio'/>{driver}
      <rom enabled='no'/>{bandwidth}
    </interface>",
            mac_text(*mac),
            escape(&config.bridge)
        );
    }
    let DomainConfig {
        uuid, memory_mib, ..
    } = config;
    let name = escape(&config.name);
    let kernel = escape_path(&config.image.kernel);
    let initrd = escape_path(&config.image.initrd);
    let command_line = escape(format!("{COMMAND_LINE} {}", config.command_line).trim_end());
    let socket = escape_path(&Path::new(SOCKET_DIRECTORY).join(config.socket_name()));
    let log = escape_path(
        &config
            .log_directory
            .join(format!("{}-serial.log", config.name)),
    );
    format!(
        "<domain type='{kind}'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <memoryBacking><allocation mode='immediate'/></memoryBacking>
  <vcpu>{cpus}</vcpu>
  <os>
    <type arch='x86_64' machine='{MACHINE}'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>{command_line}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  {cpu}
  <clock offset='utc'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>{nics}
    <serial type='file'>
      <source path='{log}' append='on'/>
      <target port='0'/>
    </serial>
    <console type='file'>
      <source path='{log}' append='on'/>
      <target type='serial' port='0'/>
    </console>
    <channel type='unix'>
      <source mode='connect' path='{socket}'>
        <reconnect enabled='yes' timeout='1'/>
      </source>
      <target type='virtio' name='{PORT_NAME}'/>
    </channel>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
"
    )
}

/// Returns a MAC address as six hexadecimal bytes with colons.
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn escape_path(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> DomainConfig {
        let image = Image {
            kernel: "/k".into(),
            initrd: "/i".into(),
        };
        DomainConfig::numbered(1, image, Accelerator::Tcg)
    }

    #[test]
    fn xml_has_both_nics_and_the_channel() {
        let xml = xml(&config());
        assert!(xml.contains("<mac address='52:54:00:4d:01:00'/>"));
        assert!(xml.contains("<mac address='52:54:00:4d:01:01'/>"));
        assert!(xml.contains("path='/run/roamcast-lab/guest-guest1.sock'"));
        assert!(xml.contains("append='on'"));
    }

    #[test]
    fn nic_is_left_to_libvirt_unless_its_driver_is_given() {
        assert!(!xml(&config()).contains("<driver"));
        let driver = |queues, without_vhost| {
            let driver = NicDriver {
                queues,
                without_vhost,
            };
            xml(&DomainConfig { driver, ..config() })
        };
        assert!(driver(1, true).contains("<driver name='qemu' queues='1'/>"));
        let two = driver(2, false);
        assert!(two.contains("<driver queues='2'/>"));
        assert!(two.contains("<vcpu>2</vcpu>"));
    }

    #[test]
    fn text_cannot_break_out_of_an_attribute() {
        let config = DomainConfig {
            name: "a'/><x>&".to_owned(),
            ..config()
        };
        let xml = xml(&config);
        assert!(xml.contains("<name>a&apos;/&gt;&lt;x&gt;&amp;</name>"));
        assert!(!xml.contains("<x>"));
    }

    #[test]
    fn libvirt_accepts_the_xml() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let limited = DomainConfig {
            bandwidth: Some(Bandwidth {
                inbound: 125,
                outbound: 1,
            }),
            driver: NicDriver {
                queues: 2,
                without_vhost: true,
            },
            ..config()
        };
        std::io::Write::write_all(&mut file, xml(&limited).as_bytes()).unwrap();
        let output = std::process::Command::new("virt-xml-validate")
            .arg(file.path())
            .arg("domain")
            .output();
        let Ok(output) = output else {
            assert!(
                std::env::var_os("CI").is_none(),
                "virt-xml-validate is missing"
            );
            println!("skipped: virt-xml-validate is not installed");
            return;
        };
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
