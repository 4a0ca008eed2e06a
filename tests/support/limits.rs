//! The `tc` commands with which libvirt implements a domain's `<bandwidth>`, in libvirt's order.
//!
//! `<inbound>` limits what the VM receives, so it shapes the TAP's egress. `<outbound>` limits what
//! the VM sends, and polices the TAP's ingress.

use std::process::Command;

use super::netns::Namespace;

/// Limits of one NIC, kB/s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// Limit of what the VM receives; `None` for no limit.
    pub inbound: Option<u32>,
    /// Limit of what the VM sends; `None` for no limit.
    pub outbound: Option<u32>,
}

/// Runs `tc` in a namespace, as libvirt does.
pub struct Limits<'a> {
    /// Namespace that has the TAP.
    pub namespace: &'a Namespace,
    /// Interface name of the TAP, which replaces `TAP` in commands.
    pub tap: &'a str,
}

impl Limits<'_> {
    /// Sets the limits, as at the start of a domain and by `virsh domiftune`. Prints and skips what
    /// this kernel cannot do.
    pub fn set(&self, bandwidth: Bandwidth) {
        self.clear();
        if let Some(rate) = bandwidth.inbound {
            self.shape(rate);
        }
        if let Some(rate) = bandwidth.outbound {
            self.police(rate);
        }
        if bandwidth == Bandwidth::default() {
            self.no_queue();
        }
    }

    /// Removes both qdiscs, as libvirt does first; either may be absent.
    pub fn clear(&self) {
        for place in ["root", "ingress"] {
            let _ = self.run(&format!("qdisc del dev {} {place}", self.tap));
        }
    }

    /// Installs what libvirt installs on each TAP without limits.
    pub fn no_queue(&self) {
        self.must("qdisc add dev TAP root handle 0: noqueue");
    }

    fn shape(&self, rate: u32) {
        self.must("qdisc add dev TAP root handle 1: htb default 1");
        self.must(&format!(
            "class add dev TAP parent 1: classid 1:1 htb rate {rate}kbps quantum 1"
        ));
        self.may("qdisc add dev TAP parent 1:1 handle 2: sfq perturb 10");
        self.may("filter add dev TAP parent 1:0 protocol all prio 1 handle 1 fw flowid 1");
    }

    fn police(&self, rate: u32) {
        self.must("qdisc add dev TAP ingress");
        let filter = "filter add dev TAP parent ffff: protocol all u32 match u32 0 0";
        let police =
            format!("{filter} police rate {rate}kbps burst {rate}kb mtu 64kb drop flowid :1");
        if !self.may(&police) {
            self.must(&format!("{filter} flowid :1"));
        }
    }

    /// Runs a command that must succeed.
    pub fn must(&self, arguments: &str) {
        if let Err(error) = self.run(&arguments.replace("TAP", self.tap)) {
            panic!("tc {arguments}: {error}");
        }
    }

    /// Runs a command that fails on kernels without some module. Returns true on success.
    fn may(&self, arguments: &str) -> bool {
        match self.run(&arguments.replace("TAP", self.tap)) {
            Ok(_) => true,
            Err(error) if is_missing(&error) => {
                println!(
                    "skipped: this kernel cannot do `tc {arguments}`: {}",
                    error.trim()
                );
                false
            }
            Err(error) => panic!("tc {arguments}: {error}"),
        }
    }

    /// Returns the output of `tc`.
    pub fn show(&self, arguments: &str) -> String {
        let arguments = arguments.replace("TAP", self.tap);
        self.run(&arguments)
            .unwrap_or_else(|error| panic!("tc {arguments}: {error}"))
    }

    /// Runs `tc`. Returns its output, or its errors if it fails.
    pub fn run(&self, arguments: &str) -> Result<String, String> {
        let output = Command::new("tc")
            .args(["-n", self.namespace.name()])
            .args(arguments.split(' '))
            .output()
            .unwrap_or_else(|error| panic!("tc: {error}"));
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }
}

/// Returns true if the error says that the kernel lacks the qdisc, filter or action.
fn is_missing(error: &str) -> bool {
    [
        "Specified qdisc kind is unknown",
        "TC classifier not found",
        "Failed to load TC action module",
        "No such file or directory",
    ]
    .iter()
    .any(|text| error.contains(text))
}
