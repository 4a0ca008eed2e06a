//! Boots and destroys guests, which are libvirt domains on the VM hosts.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Testbed, last_lines, state, virsh};
use crate::guest::control::{Control, HostSocket};
use crate::guest::domain::{self, DomainConfig};
use crate::vms::Vms;
use crate::wait;

/// Longest time from power-on until a guest answers, under TCG on two busy cores.
const BOOT: Duration = Duration::from_secs(90);

impl Testbed {
    /// Returns the control channel of the first guest.
    ///
    /// # Errors
    ///
    /// When the guest has not been booted.
    pub fn guest(&self) -> Result<&Control> {
        self.control
            .as_ref()
            .context("The guest has not been booted")
    }

    /// Destroys all running guests and boots the first guest on the first VM host.
    ///
    /// # Errors
    ///
    /// When libvirt refuses, or the guest does not answer in time.
    pub fn boot(&mut self) -> Result<()> {
        self.discard_guests()?;
        let control = self.start_guest(&self.domain, 0)?;
        if let Some(mobility) = &self.mobility {
            self.node = Some(mobility.join(&control)?);
        }
        self.control = Some(control);
        Ok(())
    }

    /// Boots the guest with this number, 2 or more, on the first VM host beside the running ones.
    ///
    /// # Errors
    ///
    /// As for [`Testbed::boot`].
    pub fn boot_further(&mut self, number: u8) -> Result<Control> {
        self.boot_further_on(number, 0).map(|(_, control)| control)
    }

    /// Boots another guest on the VM host with the index `host`. Returns the name of its domain and
    /// its control channel.
    pub(super) fn boot_further_on(&mut self, number: u8, host: usize) -> Result<(String, Control)> {
        let domain = DomainConfig {
            memory_mib: self.domain.memory_mib,
            driver: self.domain.driver,
            ..DomainConfig::numbered(number, self.domain.image.clone(), self.domain.accelerator)
        };
        let name = domain.name.clone();
        let control = self.start_guest(&domain, host)?;
        self.further.push(domain);
        Ok((name, control))
    }

    fn start_guest(&self, domain: &DomainConfig, host: usize) -> Result<Control> {
        let sockets: Vec<HostSocket> = self
            .lab
            .vms()
            .iter()
            .map(|vms| HostSocket {
                host: vms.name().to_owned(),
                path: vms.shared_directory().join(domain.socket_name()),
            })
            .collect();
        for vms in self.lab.vms() {
            let directory = vms.libvirt_log_directory().join("qemu");
            fs::create_dir_all(&directory)
                .with_context(|| format!("Failed to create {}", directory.display()))?;
        }
        let control = Control::listen(&sockets)?;
        let vms = &self.lab.vms()[host];
        let xml = vms.shared_directory().join("domain.xml");
        fs::write(&xml, domain::xml(domain)).context("Failed to write the domain's XML")?;
        // The VM host's mount namespace has the directory at this path.
        let on_host = format!("{}/domain.xml", domain::SOCKET_DIRECTORY);
        virsh(vms, &["define", &on_host])?;
        virsh(vms, &["start", &domain.name])?;
        control
            .wait_ready(BOOT)
            .with_context(|| last_words(vms, &domain.name))?;
        Ok(control)
    }

    fn discard_guests(&mut self) -> Result<()> {
        self.node = None;
        self.control = None;
        let further = std::mem::take(&mut self.further);
        for name in further
            .iter()
            .map(|domain| &domain.name)
            .chain([&self.domain.name])
        {
            for vms in self.lab.vms() {
                if state(vms, name).is_some_and(|state| state != "shut off") {
                    virsh(vms, &["destroy", name])?;
                }
                if state(vms, name).is_some() {
                    virsh(vms, &["undefine", name])?;
                }
            }
        }
        if let Some(agents) = &self.agents {
            let [vms1, _] = self.lab.vms();
            wait::until(
                "the agents to forget the guest",
                Duration::from_secs(20),
                || {
                    let listeners = agents.query(vms1, "listeners").ok()?;
                    listeners
                        .as_array()
                        .is_some_and(Vec::is_empty)
                        .then_some(())
                },
            )?;
        }
        Ok(())
    }
}

/// Returns the last output of libvirt and the serial console about a guest that does not boot.
fn last_words(vms: &Vms, domain: &str) -> String {
    let state = virsh(vms, &["domstate", "--reason", domain]);
    let console = vms
        .libvirt_log_directory()
        .join(format!("qemu/{domain}-serial.log"));
    let console = fs::read_to_string(console).unwrap_or_default();
    format!(
        "{domain} is {}; its console ends with {:?}",
        state.unwrap_or_default().trim(),
        last_lines(&console, 5)
    )
}
