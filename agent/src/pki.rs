//! Small CAs for operators without a PKI: `roamcast pki init` and `roamcast pki issue`.
//!
//! There are three CAs, because a certificate of the CA that libvirt trusts makes its owner root on
//! every host. The CA of the signalling certifies everybody with a [role](crate::role). The CA of
//! libvirt certifies hosts. The CA of QEMU certifies hosts for the copy of a VM's memory. A relay
//! thus has no certificate that libvirt accepts. Neither has QEMU, which reads its key as the user
//! that runs VMs.
//!
//! ```text
//! DIR/signalling/cacert.pem            the certificate of the CA of the signalling
//! DIR/signalling/private/cakey.pem     its key, mode 0600: keep it off the hosts
//! DIR/libvirt/cacert.pem               the same of the CA of libvirt
//! DIR/libvirt/private/cakey.pem
//! DIR/qemu/cacert.pem                  the same of the CA of QEMU
//! DIR/qemu/private/cakey.pem
//! DIR/NAME/roamcast/cacert.pem         for each host: copy DIR/NAME to its /etc/pki
//! DIR/NAME/roamcast/cert.pem           one certificate for server and client use, with the role
//! DIR/NAME/roamcast/private/key.pem
//! ```
//!
//! Hosts with an agent get these files too, at the paths of libvirt and QEMU:
//!
//! ```text
//! DIR/NAME/CA/cacert.pem
//! DIR/NAME/libvirt/servercert.pem      one certificate for server and client use
//! DIR/NAME/libvirt/clientcert.pem      a copy, at the path of libvirt's client
//! DIR/NAME/libvirt/private/serverkey.pem, clientkey.pem
//! DIR/NAME/qemu/ca-cert.pem
//! DIR/NAME/qemu/server-cert.pem, server-key.pem
//! DIR/NAME/qemu/client-cert.pem, client-key.pem
//! ```
//!
//! `roamcast pki renew` replaces keys and certificates. `roamcast pki revoke` writes the
//! certificate revocation list of each CA (RFC 5280 §5) to `crl.pem` beside the CA's certificate,
//! and moves `DIR/NAME` away.
//!
//! Keys are ECDSA P-256, which both libvirt's GnuTLS and rustls support. `init` and `issue` never
//! overwrite a file.

mod renew;
mod revoke;
mod sign;

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::SanType;
use time::OffsetDateTime;

use crate::role::Role;
pub use renew::renew;
pub use revoke::{Revoked, revoke};

/// Default validity of a CA, days.
pub const CA_DAYS: u32 = 3650;
/// Default validity of a certificate, days; a timer should renew certificates.
pub const CERTIFICATE_DAYS: u32 = 90;
/// Tolerated difference between the clocks of two hosts.
const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// Why a CA cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The file exists already.
    #[error("{} exists; nothing is overwritten, move it away or choose another directory", path.display())]
    Exists {
        /// Path of the file.
        path: PathBuf,
    },
    /// Reading or writing a file failed.
    #[error("Cannot {action} {}: {error}", path.display())]
    Io {
        /// `read`, `write`, `create`, `move` or `remove`.
        action: &'static str,
        /// Path of the file.
        path: PathBuf,
        /// Error of the system call.
        error: io::Error,
    },
    /// A certificate cannot contain the name.
    #[error("`{name}` is not a DNS name; use letters, digits, hyphens and dots")]
    InvalidName {
        /// Name that the operator gave.
        name: String,
    },
    /// The directory was made by the previous version, which had a single CA.
    #[error("{} has one CA for all, of the version before, which made relays root on every host through libvirt; run `roamcast pki init` in a new directory and issue all certificates anew", directory.display())]
    OneCa {
        /// Directory of the CA.
        directory: PathBuf,
    },
    /// The directory has no CA of QEMU.
    #[error("{} has no CA of QEMU; run `roamcast pki init {}`, which makes the one that is missing", directory.display(), directory.display())]
    NoCopyCa {
        /// Directory of the CAs.
        directory: PathBuf,
    },
    /// The directory has no certificate of the name.
    #[error("{} has no certificate of `{name}` that can be read; name one that `roamcast pki issue` has made there", directory.display())]
    NotIssued {
        /// Directory of the CAs.
        directory: PathBuf,
        /// Name that the operator gave.
        name: String,
    },
    /// Certificate and key of the CA do not match or are damaged, or signing failed.
    #[error("The CA in {} cannot sign: {error}; run `roamcast pki init` in another directory", directory.display())]
    Ca {
        /// Directory of the CA.
        directory: PathBuf,
        /// Error of the signing library.
        error: rcgen::Error,
    },
}

/// First and last second of a certificate's validity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// First second of the validity.
    pub not_before: OffsetDateTime,
    /// Last second of the validity.
    pub not_after: OffsetDateTime,
}

impl Validity {
    /// Returns a validity of `days` days from now. The start allows for clocks of other hosts that
    /// are slow.
    pub fn days(days: u32) -> Self {
        let now = OffsetDateTime::now_utc();
        Self {
            not_before: now.saturating_sub(CLOCK_SKEW.try_into().unwrap_or_default()),
            not_after: now.saturating_add(time::Duration::days(days.into())),
        }
    }
}

/// Files of a CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ca {
    /// Directory of both files.
    directory: PathBuf,
    /// CA certificate (PEM).
    pub certificate: PathBuf,
    /// Private key of the CA (PEM, mode 0600).
    pub key: PathBuf,
}

/// The three CAs in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorities {
    directory: PathBuf,
    /// CA that agents, relays and migration control servers trust.
    pub signalling: Ca,
    /// CA that libvirt on the hosts trusts.
    pub libvirt: Ca,
    /// CA that QEMU on the hosts trusts.
    pub qemu: Ca,
}

/// Request for certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssueRequest {
    /// Name of the agent, relay or server: the peers' configuration uses it, and it is the host's
    /// DNS name.
    pub name: String,
    /// Role in the signalling.
    pub role: Role,
    /// Addresses to which libvirt connects (`qemu+tls://[2001:db8::2]/system`).
    pub addresses: Vec<IpAddr>,
    /// First and last second of the certificates.
    pub validity: Validity,
}

/// Files of a certificate, all in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Certificate of the CA that signed.
    pub ca: PathBuf,
    /// The signed certificate.
    pub certificate: PathBuf,
    /// Private key of the certificate.
    pub key: PathBuf,
}

/// Certificates issued for one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// Directory to copy to the host's `/etc/pki`.
    pub directory: PathBuf,
    /// Certificate for the signalling, with the role.
    pub signalling: Certificate,
    /// Certificate for libvirt; only for a host with an agent.
    pub libvirt: Option<Certificate>,
    /// Certificate for QEMU; only for a host with an agent. The user that runs VMs must be able to
    /// read the keys.
    pub qemu: Option<Certificate>,
}

impl Authorities {
    fn of(directory: &Path) -> Self {
        let ca = |name| {
            let directory = directory.join(name);
            Ca {
                certificate: directory.join("cacert.pem"),
                key: directory.join("private/cakey.pem"),
                directory,
            }
        };
        Self {
            directory: directory.to_owned(),
            signalling: ca("signalling"),
            libvirt: ca("libvirt"),
            qemu: ca("qemu"),
        }
    }

    /// Returns each CA with the name of what it certifies.
    fn all(&self) -> [(&Ca, &'static str); 3] {
        [
            (&self.signalling, "signalling"),
            (&self.libvirt, "libvirt"),
            (&self.qemu, "QEMU"),
        ]
    }

    /// Returns the next steps, for a person.
    pub fn next_steps(&self) -> String {
        let directory = self.directory.display();
        format!(
            "CA of the signalling {}\nits key              {} (keep it off the hosts)\n\
             CA of libvirt        {}\nits key              {} (keep it off the hosts)\n\
             CA of QEMU           {}\nits key              {} (keep it off the hosts)\n\n\
             Next, once for each host, relay and migration control server:\n  \
             roamcast pki issue {directory} NAME --role agent|relay|mcs --address ADDRESS\n",
            self.signalling.certificate.display(),
            self.signalling.key.display(),
            self.libvirt.certificate.display(),
            self.libvirt.key.display(),
            self.qemu.certificate.display(),
            self.qemu.key.display(),
        )
    }
}

impl Issued {
    /// Returns the files of a host, relay or server in `directory`.
    fn at(directory: PathBuf, role: Role) -> Self {
        let roamcast = directory.join("roamcast");
        let (libvirt, qemu) = (directory.join("libvirt"), directory.join("qemu"));
        let has_vms = role == Role::Agent;
        Self {
            signalling: Certificate {
                ca: roamcast.join("cacert.pem"),
                certificate: roamcast.join("cert.pem"),
                key: roamcast.join("private/key.pem"),
            },
            libvirt: has_vms.then(|| Certificate {
                ca: directory.join("CA/cacert.pem"),
                certificate: libvirt.join("servercert.pem"),
                key: libvirt.join("private/serverkey.pem"),
            }),
            qemu: has_vms.then(|| Certificate {
                ca: qemu.join("ca-cert.pem"),
                certificate: qemu.join("server-cert.pem"),
                key: qemu.join("server-key.pem"),
            }),
            directory,
        }
    }

    /// Returns the next steps, for a person.
    pub fn next_steps(&self) -> String {
        let directory = self.directory.display();
        let name = self
            .directory
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        let replaces = match self.libvirt {
            Some(_) => format!(
                "Let QEMU, and nobody else, read its keys (here as Debian names its user):\n  \
                 ssh root@{name} chown -R libvirt-qemu /etc/pki/qemu\n\n\
                 If it replaces one that is in use, which Roamcast sees by itself and libvirt does not:\n  \
                 ssh root@{name} \"systemctl try-restart 'libvirtd*.service' 'virtproxyd*.service'\"\n"
            ),
            None => "If it replaces one that is in use, Roamcast sees it by itself.\n".to_owned(),
        };
        format!(
            "Certificate {}\n\nNext:\n  ssh root@{name} mkdir -p /etc/pki\n  \
             scp -r {directory}/. root@{name}:/etc/pki/\n\n{replaces}",
            self.signalling.certificate.display(),
        )
    }
}

/// Makes the CAs in `directory`, or only the CA of QEMU if the other two exist.
///
/// # Errors
///
/// [`PkiError::Exists`] if all exist, [`PkiError::OneCa`], [`PkiError::Io`].
pub fn init(directory: &Path, name: &str, validity: Validity) -> Result<Authorities, PkiError> {
    refuse_one_ca(directory)?;
    let authorities = Authorities::of(directory);
    let all = authorities.all();
    let is_there = |ca: &Ca| ca.certificate.exists() && ca.key.exists();
    let missing = match all {
        [(signalling, _), (libvirt, _), qemu] if is_there(signalling) && is_there(libvirt) => {
            vec![qemu]
        }
        all => all.to_vec(),
    };
    for (ca, _) in &missing {
        refuse_existing([ca.certificate.as_path(), ca.key.as_path()])?;
    }
    for (ca, purpose) in missing {
        ca.make(&format!("{name} of {purpose}"), validity)?;
    }
    Ok(authorities)
}

/// Issues certificates for server and client use: one of the signalling, and for a host with an
/// agent one for libvirt and one for QEMU.
///
/// # Errors
///
/// [`PkiError::InvalidName`], [`PkiError::Exists`] if the name has certificates already,
/// [`PkiError::OneCa`], [`PkiError::NoCopyCa`], [`PkiError::Io`], [`PkiError::Ca`] if a CA cannot
/// sign.
pub fn issue(directory: &Path, request: &IssueRequest) -> Result<Issued, PkiError> {
    let request = IssueRequest {
        name: request.name.to_ascii_lowercase(),
        ..request.clone()
    };
    let names = names(&request)?;
    let host = directory.join(&request.name);
    refuse_one_ca(directory)?;
    refuse_existing([host.as_path()])?;
    certify(directory, &request, &names, host)
}

/// Returns true if a certificate can contain the name. The name is also a directory; a DNS name
/// contains no slash.
fn is_name(name: &str) -> bool {
    rustls_pki_types::DnsName::try_from(name).is_ok() && !name.contains('*')
}

/// Returns the Subject Alternative Names of a host's certificates.
fn names(request: &IssueRequest) -> Result<Vec<SanType>, PkiError> {
    let invalid = || PkiError::InvalidName {
        name: request.name.clone(),
    };
    let name = request.name.as_str();
    if !is_name(name) {
        return Err(invalid());
    }
    let mut names = vec![
        name.try_into()
            .map(SanType::DnsName)
            .map_err(|_| invalid())?,
    ];
    names.extend(request.addresses.iter().copied().map(SanType::IpAddress));
    Ok(names)
}

/// Signs certificates and writes them to the directory `host`.
fn certify(
    directory: &Path,
    request: &IssueRequest,
    names: &[SanType],
    host: PathBuf,
) -> Result<Issued, PkiError> {
    let authorities = Authorities::of(directory);
    let role = request.role.uri().as_str().try_into();
    let role = SanType::URI(role.map_err(|error| authorities.signalling.failed(error))?);
    let sign = |ca: &Ca, names| ca.sign(&request.name, names, request.validity);
    let signalling = sign(&authorities.signalling, [names, &[role]].concat())?;
    let issued = Issued::at(host, request.role);
    if let (Some(for_libvirt), Some(for_qemu)) = (&issued.libvirt, &issued.qemu) {
        if !authorities.qemu.certificate.exists() {
            let directory = directory.to_owned();
            return Err(PkiError::NoCopyCa { directory });
        }
        let libvirt = sign(&authorities.libvirt, names.to_vec())?;
        let qemu = sign(&authorities.qemu, names.to_vec())?;
        libvirt.write_for_libvirt(for_libvirt)?;
        qemu.write_for_qemu(for_qemu)?;
    }
    signalling.write(&issued.signalling)?;
    Ok(issued)
}

/// Refuses a directory in which the previous version has made its single CA.
fn refuse_one_ca(directory: &Path) -> Result<(), PkiError> {
    if directory.join("private/cakey.pem").exists() {
        return Err(PkiError::OneCa {
            directory: directory.to_owned(),
        });
    }
    Ok(())
}

fn refuse_existing<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<(), PkiError> {
    match paths
        .into_iter()
        .find(|path| path.symlink_metadata().is_ok())
    {
        None => Ok(()),
        Some(path) => Err(PkiError::Exists {
            path: path.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests;
