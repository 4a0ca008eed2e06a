//! Checks from files which TLS clients this host's libvirt admits: an admitted client is root on
//! this host.
//!
//! The agent warns in two cases, if libvirt listens. Either libvirt trusts a CA of the signalling,
//! and thus admits every relay. Or libvirt has no `tls_allowed_dn_list`, and thus admits every
//! certificate of its CA. The settings are those of `libvirtd`, or of `virtproxyd` if the daemons
//! are split. If both files exist, the check considers both, because files do not tell which daemon
//! runs.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::settings::{below, values};

/// Configuration files of the daemons that listen by TLS.
const SETTINGS: [&str; 2] = ["etc/libvirt/libvirtd.conf", "etc/libvirt/virtproxyd.conf"];
/// Default path of the daemons' CA.
const CA: &str = "/etc/pki/CA/cacert.pem";
/// Default TCP port of the daemons.
const PORT: u16 = 16514;
/// The kernel's lists of TCP sockets, and the state of a listening socket in them.
const SOCKETS: [&str; 2] = ["proc/net/tcp", "proc/net/tcp6"];
const LISTENING: &str = "0A";

/// Returns one sentence for each setting that admits more clients than necessary. `signalling` is
/// the file with the CAs of the signalling. The files of libvirt and the kernel are those below
/// `root`.
pub fn advice(root: &Path, signalling: &Path) -> Vec<String> {
    let settings: String = SETTINGS
        .iter()
        .filter_map(|path| fs::read_to_string(root.join(path)).ok())
        .map(|text| text + "\n")
        .collect();
    let ports = values(&settings, "tls_port").filter_map(|port| port.parse().ok());
    if !is_listening(root, &ports.chain([PORT]).collect()) {
        return Vec::new();
    }
    let mut advice = Vec::new();
    let own = certificates(signalling);
    let trusted = values(&settings, "ca_file")
        .chain([CA])
        .map(|path| below(root, path));
    if let Some(ca) = trusted
        .into_iter()
        .find(|ca| !certificates(ca).is_disjoint(&own))
    {
        advice.push(format!(
            "libvirt trusts the CA of the signalling ({} and {}): each relay is root on this host; give libvirt a CA of \
             its own, as `roamcast pki init` makes one",
            ca.display(),
            signalling.display()
        ));
    }
    if values(&settings, "tls_allowed_dn_list").next().is_none() {
        advice.push(
            "libvirt listens by TLS without tls_allowed_dn_list: whoever has a certificate of its CA is root on this \
             host; name the other hosts in /etc/libvirt/libvirtd.conf (or virtproxyd.conf)"
                .to_owned(),
        );
    }
    advice
}

/// Returns the certificates of a file; none if the file is missing.
fn certificates(path: &Path) -> BTreeSet<Vec<u8>> {
    CertificateDer::pem_file_iter(path)
        .map(|found| found.flatten().map(|it| it.to_vec()).collect())
        .unwrap_or_default()
}

/// Returns true if a socket listens on one of these TCP ports.
fn is_listening(root: &Path, ports: &BTreeSet<u16>) -> bool {
    SOCKETS.iter().any(|path| {
        let sockets = fs::read_to_string(root.join(path)).unwrap_or_default();
        sockets.lines().any(|line| {
            // `  0: ADDRESS:PORT REMOTE:PORT STATE ...`, in hexadecimal digits.
            let mut fields = line.split_whitespace().skip(1);
            let port = fields
                .next()
                .and_then(|address| address.rsplit_once(':'))
                .and_then(|(_, port)| u16::from_str_radix(port, 16).ok());
            fields.nth(1) == Some(LISTENING) && port.is_some_and(|port| ports.contains(&port))
        })
    })
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::pki::{self, Authorities, Validity};

    /// A host whose libvirt listens on 16514 (0x4082) and trusts its own CA.
    struct Host {
        root: TempDir,
        authorities: Authorities,
    }

    impl Host {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let authorities = pki::init(&root.path().join("pki"), "CA", Validity::days(1)).unwrap();
            let host = Self { root, authorities };
            host.listens("00000000000000000000000000000000:4082", LISTENING);
            let ca = fs::read_to_string(&host.authorities.libvirt.certificate).unwrap();
            host.write("etc/pki/CA/cacert.pem", &ca);
            host
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn listens(&self, address: &str, state: &str) {
            let line = format!("   0: {address} 00000000000000000000000000000000:0000 {state} 0");
            self.write(
                "proc/net/tcp6",
                &format!("  sl  local_address remote_address st\n{line}\n"),
            );
        }

        fn advice(&self) -> Vec<String> {
            advice(self.root.path(), &self.authorities.signalling.certificate)
        }

        /// Makes libvirt also trust the CA of the signalling, in the file at `path`.
        fn trust_all(&self, path: &str) {
            let mut both = String::new();
            for ca in [&self.authorities.libvirt, &self.authorities.signalling] {
                both += &fs::read_to_string(&ca.certificate).unwrap();
            }
            self.write(path, &both);
        }
    }

    const LISTED: &str = "tls_allowed_dn_list = [\"CN=vms1\", \"CN=vms2\"]\n";

    #[test]
    fn host_whose_libvirt_names_whom_it_lets_in_needs_no_advice() {
        for path in SETTINGS {
            let host = Host::new();
            host.write(path, LISTED);
            assert_eq!(host.advice(), Vec::<String>::new());
        }
    }

    #[test]
    fn libvirt_that_lets_in_all_that_its_ca_signs_is_told_of() {
        let host = Host::new();
        assert_eq!(host.advice().len(), 1);
        host.write("etc/libvirt/libvirtd.conf", &format!("#{LISTED}"));
        let advice = host.advice();
        assert_eq!(advice.len(), 1);
        assert!(advice[0].contains("without tls_allowed_dn_list"));
    }

    #[test]
    fn libvirt_that_trusts_the_ca_of_the_signalling_is_told_of() {
        let host = Host::new();
        host.write("etc/libvirt/libvirtd.conf", LISTED);
        host.trust_all("etc/pki/CA/cacert.pem");
        let advice = host.advice();
        assert_eq!(advice.len(), 1);
        assert!(advice[0].contains("trusts the CA of the signalling"));

        let host = Host::new();
        host.trust_all("elsewhere.pem");
        let settings = format!("{LISTED}ca_file = \"/elsewhere.pem\"\n");
        host.write("etc/libvirt/virtproxyd.conf", &settings);
        assert_eq!(host.advice().len(), 1);
    }

    #[test]
    fn libvirt_that_does_not_listen_lets_nobody_in() {
        let host = Host::new();
        host.trust_all("etc/pki/CA/cacert.pem");
        host.listens("00000000000000000000000000000000:4082", "01");
        assert_eq!(host.advice(), Vec::<String>::new());
        host.listens("00000000000000000000000000000000:4083", LISTENING);
        assert_eq!(host.advice(), Vec::<String>::new());
        host.write("etc/libvirt/libvirtd.conf", "tls_port = \"16515\"\n");
        assert_eq!(host.advice().len(), 2);
    }

    #[test]
    fn files_that_are_missing_or_nonsense_are_no_reason_to_fail() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(
            advice(root.path(), Path::new("/nowhere")),
            Vec::<String>::new()
        );
        let host = Host::new();
        host.write("proc/net/tcp6", "\u{e9}: :\n0: x:zz y 0A\n");
        host.write("etc/libvirt/libvirtd.conf", "= =\ntls_port = \"x\"\n");
        host.write("etc/pki/CA/cacert.pem", "-----BEGIN CERTIFICATE-----\n!");
        assert_eq!(host.advice(), Vec::<String>::new());
    }
}
