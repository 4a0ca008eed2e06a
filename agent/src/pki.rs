//! A small CA for those who have none: `roamcast pki init` and `roamcast pki issue`.
//!
//! ```text
//! DIR/cacert.pem                       the CA's certificate
//! DIR/private/cakey.pem                its key, mode 0600: keep it off the hosts
//! DIR/NAME/CA/cacert.pem               for each host: copy DIR/NAME to its /etc/pki
//! DIR/NAME/libvirt/servercert.pem      one certificate for server and client use
//! DIR/NAME/libvirt/clientcert.pem      the same again, where libvirt's client looks
//! DIR/NAME/libvirt/private/serverkey.pem, clientkey.pem
//! ```
//!
//! Keys are ECDSA P-256, which libvirt's GnuTLS and rustls both take. Nothing is ever overwritten.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use time::OffsetDateTime;

/// How long a CA is valid unless told otherwise, days.
pub const CA_DAYS: u32 = 3650;
/// How long an agent's certificate is valid unless told otherwise, days.
pub const CERTIFICATE_DAYS: u32 = 825;
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
        /// `read`, `write` or `create`.
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

/// A CA that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ca {
    /// Its certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// What to certify.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssueRequest {
    /// Name of the agent; its peers' configuration names it so, and it is the host's DNS name.
    pub name: String,
    /// Addresses that libvirt connects to (`qemu+tls://[2001:db8::2]/system`).
    pub addresses: Vec<IpAddr>,
    /// How long.
    pub validity: Validity,
}

/// A certificate that was issued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// Directory to be copied to the host's `/etc/pki`.
    pub directory: PathBuf,
    /// The CA's certificate in it.
    pub ca: PathBuf,
    /// The certificate in it.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Ca {
    /// What to do next, for a person.
    pub fn next_steps(&self) -> String {
        let directory = self
            .certificate
            .parent()
            .unwrap_or(Path::new("."))
            .display();
        format!(
            "CA certificate {}\nCA key         {} (keep it off the hosts)\n\n\
             Next, once for each host:\n  \
             roamcast pki issue {directory} NAME --address ADDRESS\n",
            self.certificate.display(),
            self.key.display(),
        )
    }
}

impl Issued {
    /// What to do next, for a person.
    pub fn next_steps(&self) -> String {
        let directory = self.directory.display();
        let name = self
            .directory
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        format!(
            "Certificate {}\n\nNext:\n  ssh root@{name} mkdir -p /etc/pki\n  \
             scp -r {directory}/. root@{name}:/etc/pki/\n\n\
             If it replaces one that is in use:\n  \
             ssh root@{name} \"systemctl try-restart 'libvirtd*.service' 'virtproxyd*.service' \
             'roamcast*.service'\"\n",
            self.certificate.display(),
        )
    }
}

/// Makes a CA in `directory`.
///
/// # Errors
///
/// [`PkiError::Exists`] where there is one already, [`PkiError::Io`].
pub fn init(directory: &Path, name: &str, validity: Validity) -> Result<Ca, PkiError> {
    let ca = ca_files(directory);
    refuse_existing([ca.certificate.as_path(), ca.key.as_path()])?;
    let failed = |error| PkiError::Ca {
        directory: directory.to_owned(),
        error,
    };
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::default();
    params.not_before = validity.not_before;
    params.not_after = validity.not_after;
    params.distinguished_name = common_name(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key).map_err(failed)?;
    create_directory(directory, 0o755)?;
    create_directory(&directory.join("private"), 0o700)?;
    write_new(&ca.key, &key.serialize_pem(), 0o600)?;
    write_new(&ca.certificate, &certificate.pem(), 0o644)?;
    Ok(ca)
}

/// Issues a certificate for server and client use, signed by the CA in `directory`.
///
/// # Errors
///
/// [`PkiError::InvalidName`], [`PkiError::Exists`] where the name has one already,
/// [`PkiError::Io`], [`PkiError::Ca`] where the CA cannot sign.
pub fn issue(directory: &Path, request: &IssueRequest) -> Result<Issued, PkiError> {
    let name = request.name.to_ascii_lowercase();
    let invalid = || PkiError::InvalidName {
        name: request.name.clone(),
    };
    // The name becomes a directory too: a valid DNS name holds no slash.
    if rustls_pki_types::DnsName::try_from(name.as_str()).is_err() || name.contains('*') {
        return Err(invalid());
    }
    let failed = |error| PkiError::Ca {
        directory: directory.to_owned(),
        error,
    };
    let host = directory.join(&name);
    let libvirt = host.join("libvirt");
    let private = libvirt.join("private");
    let issued = Issued {
        directory: host.clone(),
        ca: host.join("CA/cacert.pem"),
        certificate: libvirt.join("servercert.pem"),
        key: private.join("serverkey.pem"),
    };
    refuse_existing([host.as_path()])?;

    let ca = ca_files(directory);
    let ca_certificate = read(&ca.certificate)?;
    let ca_key = KeyPair::from_pem(&read(&ca.key)?).map_err(failed)?;
    let issuer = Issuer::from_ca_cert_pem(&ca_certificate, ca_key).map_err(failed)?;

    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::default();
    params.not_before = request.validity.not_before;
    params.not_after = request.validity.not_after;
    params.distinguished_name = common_name(&name);
    params.subject_alt_names = std::iter::once(
        name.as_str()
            .try_into()
            .map(SanType::DnsName)
            .map_err(|_| invalid())?,
    )
    .chain(request.addresses.iter().copied().map(SanType::IpAddress))
    .collect();
    // libvirt warns about a certificate without key encipherment, although ECDSA has no use of it.
    params.key_usages = vec![
        KeyUsagePurpose::DigitalSignature,
        KeyUsagePurpose::KeyEncipherment,
    ];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, &issuer).map_err(failed)?.pem();
    let key = key.serialize_pem();

    create_directory(&host.join("CA"), 0o755)?;
    create_directory(&private, 0o700)?;
    for (path, content, mode) in [
        (&issued.ca, &ca_certificate, 0o644),
        (&issued.certificate, &certificate, 0o644),
        (&libvirt.join("clientcert.pem"), &certificate, 0o644),
        (&issued.key, &key, 0o600),
        (&private.join("clientkey.pem"), &key, 0o600),
    ] {
        write_new(path, content, mode)?;
    }
    Ok(issued)
}

fn ca_files(directory: &Path) -> Ca {
    Ca {
        certificate: directory.join("cacert.pem"),
        key: directory.join("private/cakey.pem"),
    }
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished_name = DistinguishedName::new();
    distinguished_name.push(DnType::CommonName, name);
    distinguished_name
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

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|error| PkiError::Io {
        action: "read",
        path: path.to_owned(),
        error,
    })
}

fn create_directory(path: &Path, mode: u32) -> Result<(), PkiError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path.parent().unwrap_or(path))
        .and_then(|()| DirBuilder::new().recursive(true).mode(mode).create(path))
        .map_err(|error| PkiError::Io {
            action: "create",
            path: path.to_owned(),
            error,
        })
}

fn write_new(path: &Path, content: &str, mode: u32) -> Result<(), PkiError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(content.as_bytes()))
        .map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => PkiError::Exists {
                path: path.to_owned(),
            },
            _ => PkiError::Io {
                action: "write",
                path: path.to_owned(),
                error,
            },
        })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::net::tls::{Tls, TlsError, TlsFiles, certificate_names};
    use rustls_pki_types::CertificateDer;
    use rustls_pki_types::pem::PemObject;

    fn request(name: &str) -> IssueRequest {
        IssueRequest {
            name: name.to_owned(),
            addresses: vec!["2001:db8::2".parse().unwrap()],
            validity: Validity::days(1),
        }
    }

    fn files(issued: &Issued) -> TlsFiles {
        TlsFiles {
            ca: issued.ca.clone(),
            certificate: issued.certificate.clone(),
            key: issued.key.clone(),
        }
    }

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn issued_certificate_is_what_tls_accepts() {
        let directory = tempfile::tempdir().unwrap();
        let ca = init(directory.path(), "CA", Validity::days(1)).unwrap();
        let issued = issue(directory.path(), &request("VMS1.example")).unwrap();
        Tls::load(&files(&issued), "vms1.example").unwrap();
        let certificate = CertificateDer::from_pem_file(&issued.certificate).unwrap();
        assert_eq!(certificate_names(&certificate), ["vms1.example"]);
        assert!(ca.next_steps().contains("pki issue"));
        assert!(issued.next_steps().contains("root@vms1.example"));
    }

    #[test]
    fn keys_are_readable_by_their_owner_only() {
        let directory = tempfile::tempdir().unwrap();
        let ca = init(directory.path(), "CA", Validity::days(1)).unwrap();
        let issued = issue(directory.path(), &request("vms1")).unwrap();
        assert_eq!(mode(&ca.key), 0o600);
        assert_eq!(mode(&issued.key), 0o600);
        assert_eq!(mode(issued.key.parent().unwrap()), 0o700);
    }

    #[test]
    fn nothing_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        init(directory.path(), "CA", Validity::days(1)).unwrap();
        let again = init(directory.path(), "CA", Validity::days(1));
        assert!(matches!(again, Err(PkiError::Exists { .. })));
        issue(directory.path(), &request("vms1")).unwrap();
        let again = issue(directory.path(), &request("vms1"));
        assert!(matches!(again, Err(PkiError::Exists { .. })));
    }

    #[test]
    fn names_that_are_no_dns_names_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        init(directory.path(), "CA", Validity::days(1)).unwrap();
        for name in ["", "..", "../escape", "a/b", "*.example", "a b", "-"] {
            let result = issue(directory.path(), &request(name));
            assert!(
                matches!(result, Err(PkiError::InvalidName { .. })),
                "{name}: {result:?}"
            );
        }
    }

    #[test]
    fn directory_without_ca_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let error = issue(directory.path(), &request("vms1")).unwrap_err();
        assert!(error.to_string().contains("cacert.pem"), "{error}");
    }

    #[test]
    fn tls_tells_missing_expired_foreign_misnamed_and_mismatched_files_apart() {
        let directories = [(); 2].map(|()| tempfile::tempdir().unwrap());
        for directory in &directories {
            init(directory.path(), "CA", Validity::days(1)).unwrap();
        }
        let [own, other] = &directories;
        let good = files(&issue(own.path(), &request("vms1")).unwrap());
        let foreign = files(&issue(other.path(), &request("vms1")).unwrap());
        let now = OffsetDateTime::now_utc();
        let expired = issue(
            own.path(),
            &IssueRequest {
                validity: Validity {
                    not_before: now.saturating_sub(time::Duration::days(2)),
                    not_after: now.saturating_sub(time::Duration::days(1)),
                },
                ..request("old")
            },
        )
        .unwrap();

        let missing = TlsFiles {
            certificate: own.path().join("nowhere.pem"),
            ..good.clone()
        };
        assert!(matches!(
            Tls::load(&missing, "vms1"),
            Err(TlsError::Read { .. })
        ));
        let empty = TlsFiles {
            ca: good.key.clone(),
            ..good.clone()
        };
        assert!(matches!(
            Tls::load(&empty, "vms1"),
            Err(TlsError::Empty { .. })
        ));
        assert!(matches!(
            Tls::load(&files(&expired), "old"),
            Err(TlsError::Expired { .. })
        ));
        let wrong_ca = TlsFiles {
            ca: foreign.ca.clone(),
            ..good.clone()
        };
        assert!(matches!(
            Tls::load(&wrong_ca, "vms1"),
            Err(TlsError::WrongCa { .. })
        ));
        assert!(matches!(
            Tls::load(&good, "vms2"),
            Err(TlsError::WrongName { .. })
        ));
        let wrong_key = TlsFiles {
            key: foreign.key.clone(),
            ..good.clone()
        };
        assert!(matches!(
            Tls::load(&wrong_key, "vms1"),
            Err(TlsError::WrongKey { .. })
        ));
        assert!(matches!(
            Tls::load(&good, "no name"),
            Err(TlsError::InvalidName { .. })
        ));
    }
}
