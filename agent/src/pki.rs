//! Small CAs for those who have none: `roamcast pki init` and `roamcast pki issue`.
//!
//! There are three, because whoever has a certificate of the CA that libvirt trusts is root on every host: the
//! CA of the signalling, which certifies everybody with a [role](crate::role), the CA of libvirt, which
//! certifies hosts, and the CA of QEMU, which certifies them for the copy of a VM's memory. A relay has
//! nothing that libvirt knows. Neither has QEMU, which reads its key as the user that VMs run as.
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
//! For hosts with an agent, where libvirt and QEMU look:
//!
//! ```text
//! DIR/NAME/CA/cacert.pem
//! DIR/NAME/libvirt/servercert.pem      one certificate for server and client use
//! DIR/NAME/libvirt/clientcert.pem      the same again, where libvirt's client looks
//! DIR/NAME/libvirt/private/serverkey.pem, clientkey.pem
//! DIR/NAME/qemu/ca-cert.pem
//! DIR/NAME/qemu/server-cert.pem, server-key.pem
//! DIR/NAME/qemu/client-cert.pem, client-key.pem
//! ```
//!
//! `roamcast pki renew` makes new keys and certificates in their place. `roamcast pki revoke` writes the list of
//! revoked certificates of each CA (RFC 5280 §5) to `crl.pem` beside the CA's certificate, and moves `DIR/NAME` away.
//!
//! Keys are ECDSA P-256, which libvirt's GnuTLS and rustls both take. Nothing is ever overwritten.

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

/// How long a CA is valid unless told otherwise, days.
pub const CA_DAYS: u32 = 3650;
/// How long a certificate is valid unless told otherwise, days. They are to be renewed by a timer.
pub const CERTIFICATE_DAYS: u32 = 90;
/// Tolerated difference of clocks between hosts.
const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// Why the CA could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file is there already.
    #[error("{} exists; nothing is overwritten, move it away or choose another directory", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file could not be read or written.
    #[error("Cannot {action} {}: {error}", path.display())]
    Io {
        /// `read`, `write`, `create`, `move` or `remove`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The name cannot be in a certificate.
    #[error("`{name}` is not a DNS name; use letters, digits, hyphens and dots")]
    InvalidName {
        /// The name.
        name: String,
    },
    /// The directory is that of the version before.
    #[error("{} has one CA for all, of the version before, which made relays root on every host through libvirt; run `roamcast pki init` in a new directory and issue all certificates anew", directory.display())]
    OneCa {
        /// The directory.
        directory: PathBuf,
    },
    /// The directory has no CA of QEMU.
    #[error("{} has no CA of QEMU; run `roamcast pki init {}`, which makes the one that is missing", directory.display(), directory.display())]
    NoCopyCa {
        /// The directory.
        directory: PathBuf,
    },
    /// There is no certificate of that name.
    #[error("{} has no certificate of `{name}` that can be read; name one that `roamcast pki issue` has made there", directory.display())]
    NotIssued {
        /// The directory.
        directory: PathBuf,
        /// The name.
        name: String,
    },
    /// The CA's files do not fit each other or are damaged, or signing failed.
    #[error("The CA in {} cannot sign: {error}; run `roamcast pki init` in another directory", directory.display())]
    Ca {
        /// Its directory.
        directory: PathBuf,
        /// What went wrong.
        error: rcgen::Error,
    },
}

/// From when to when a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// First second.
    pub not_before: OffsetDateTime,
    /// Last second.
    pub not_after: OffsetDateTime,
}

impl Validity {
    /// From now (with some tolerance for other hosts' clocks) for `days` days.
    pub fn days(days: u32) -> Self {
        let now = OffsetDateTime::now_utc();
        Self {
            not_before: now.saturating_sub(CLOCK_SKEW.try_into().unwrap_or_default()),
            not_after: now.saturating_add(time::Duration::days(days.into())),
        }
    }
}

/// The files of a CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ca {
    /// Its directory.
    directory: PathBuf,
    /// Its certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// The CAs that a directory has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorities {
    directory: PathBuf,
    /// That of the signalling.
    pub signalling: Ca,
    /// That which the libvirt of the hosts trusts.
    pub libvirt: Ca,
    /// That which their QEMU trusts.
    pub qemu: Ca,
}

/// What to certify.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssueRequest {
    /// Its name; peers' configuration names it so, and it is the host's DNS name.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// Addresses that libvirt connects to (`qemu+tls://[2001:db8::2]/system`).
    pub addresses: Vec<IpAddr>,
    /// How long.
    pub validity: Validity,
}

/// Files of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Certificate of the CA that signed it.
    pub ca: PathBuf,
    /// The certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// What was issued for a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// Directory to be copied to the host's `/etc/pki`.
    pub directory: PathBuf,
    /// For the signalling.
    pub signalling: Certificate,
    /// For libvirt, where there is an agent.
    pub libvirt: Option<Certificate>,
    /// For QEMU, where there is an agent. The user that VMs run as has to be able to read the keys.
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

    /// Each with what it is of.
    fn all(&self) -> [(&Ca, &'static str); 3] {
        [
            (&self.signalling, "signalling"),
            (&self.libvirt, "libvirt"),
            (&self.qemu, "QEMU"),
        ]
    }

    /// What to do next, for a person.
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
    /// The files of a host, relay or server whose directory is `directory`.
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

    /// What to do next, for a person.
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

/// Makes the CAs in `directory`, or the one of QEMU where the other two are there already.
///
/// # Errors
///
/// [`PkiError::Exists`] where there is one already, [`PkiError::OneCa`], [`PkiError::Io`].
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

/// Issues certificates for server and client use: one of the signalling, and for an agent's host one for its
/// libvirt and one for its QEMU.
///
/// # Errors
///
/// [`PkiError::InvalidName`], [`PkiError::Exists`] where the name has one already,
/// [`PkiError::OneCa`], [`PkiError::NoCopyCa`], [`PkiError::Io`], [`PkiError::Ca`] where a CA cannot sign.
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

/// Whether a name can be certified. It becomes a directory too: a DNS name holds no slash.
fn is_name(name: &str) -> bool {
    rustls_pki_types::DnsName::try_from(name).is_ok() && !name.contains('*')
}

/// What a host's certificates are for.
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

/// Signs certificates, and writes them into the directory `host`.
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

/// Refuses a directory in which the version before has made its CA.
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
