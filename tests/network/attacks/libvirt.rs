//! A relay's certificate tried on a host's libvirt, which would give its owner root there. The test
//! runs the real `libvirtd` and `virsh` with their own directories.

use std::fs;
use std::net::{Ipv6Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::mount::{MsFlags, mount};
use roamcast::net::tls::TlsFiles;
use roamcast::pki::{self, Authorities, Validity};
use roamcast::role::Role;
use support::agent::issue;
use support::netns::{Namespace, privileged, wait_for};

/// libvirt's TLS port.
const PORT: u16 = 16514;
/// Domain that only an administrator of the host may define, for libvirt's `test` driver.
const DOMAIN: &str = "<domain type='test'><name>evil</name><memory>8192</memory>\
    <os><type>hvm</type></os></domain>";

/// libvirtd of a host; killed on drop.
struct Libvirtd(Child);

impl Libvirtd {
    /// Starts libvirtd with the certificates of `host`. libvirtd accepts clients of the CA `ca`.
    fn start(directory: &Path, host: &Path, ca: &Path) -> Self {
        for private in [
            "/run",
            "/etc/libvirt",
            "/var/lib/libvirt",
            "/var/cache/libvirt",
        ] {
            let none = None::<&str>;
            mount(none, private, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        }
        let settings = directory.join("libvirtd.conf");
        let text = format!(
            "listen_tls = 1\nlisten_addr = \"::1\"\nca_file = {ca:?}\n\
             cert_file = {:?}\nkey_file = {:?}\ntls_allowed_dn_list = [\"CN=vms1\", \"CN=relay1\"]\n",
            host.join("libvirt/servercert.pem"),
            host.join("libvirt/private/serverkey.pem"),
        );
        fs::write(&settings, text).unwrap();
        let log = fs::File::create(directory.join("libvirtd.log")).unwrap();
        let child = Command::new("libvirtd")
            .args(["--listen", "--config"])
            .arg(&settings)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        wait_for("libvirtd to listen", || {
            TcpStream::connect((Ipv6Addr::LOCALHOST, PORT)).ok()
        });
        Self(child)
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Writes both CAs into one file, because an attacker can trust any server.
fn both(directory: &Path, authorities: &Authorities) -> PathBuf {
    let read = |path: &Path| fs::read_to_string(path).unwrap();
    let path = directory.join("both.pem");
    let text = read(&authorities.libvirt.certificate) + &read(&authorities.signalling.certificate);
    fs::write(&path, text).unwrap();
    path
}

/// Defines a domain over TLS with the given certificate.
fn define(directory: &Path, ca: &Path, certificate: &Path, key: &Path) -> Output {
    let own = tempfile::tempdir_in(directory).unwrap();
    for (from, to) in [
        (ca, "cacert.pem"),
        (certificate, "clientcert.pem"),
        (key, "clientkey.pem"),
    ] {
        fs::copy(from, own.path().join(to)).unwrap();
    }
    let domain = directory.join("evil.xml");
    fs::write(&domain, DOMAIN).unwrap();
    let uri = format!("test+tls://[::1]/default?pkipath={}", own.path().display());
    Command::new("timeout")
        .args(["30", "virsh", "-c", &uri, "define"])
        .arg(domain)
        .output()
        .unwrap()
}

#[test]
fn certificate_of_a_relay_defines_nothing_on_a_host() {
    if !privileged() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let pki = directory.join("pki");
    let authorities = pki::init(&pki, "test CA", Validity::days(1)).unwrap();
    issue(&pki, "vms1", Role::Agent);
    let relay = issue(&pki, "relay1", Role::Relay);
    let host = pki.join("vms1");
    let all = both(directory, &authorities);
    let attack = |TlsFiles {
                      certificate, key, ..
                  }: &TlsFiles| {
        let output = define(directory, &all, certificate, key);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), said)
    };
    let within = |ca: &Path, work: &(dyn Fn() + Sync)| {
        Namespace::new("host").run_with_bpffs(|_| {
            let _libvirtd = Libvirtd::start(directory, &host, ca);
            work();
        });
    };
    // As if one CA certified everybody.
    within(&all, &|| {
        let (defined, said) = attack(&relay);
        assert!(defined, "no attack: {said}");
    });
    within(&host.join("CA/cacert.pem"), &|| {
        let (defined, said) = attack(&relay);
        assert!(!defined && said.contains("TLS"), "{said}");
        // Other hosts are still accepted.
        let libvirt = host.join("libvirt");
        let (defined, said) = attack(&TlsFiles {
            ca: all.clone(),
            certificate: libvirt.join("clientcert.pem"),
            key: libvirt.join("private/clientkey.pem"),
            crl: libvirt.join("crl.pem"),
        });
        assert!(defined, "{said}");
    });
    let log = fs::read_to_string(directory.join("libvirtd.log")).unwrap();
    assert!(log.contains("authentication failed"), "{log}");
}
