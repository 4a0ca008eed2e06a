//! TLS of the signalling: version 1.3 only, certificates on both sides.
//!
//! The CA is one that libvirt does not trust, since whoever libvirt trusts is root on its host. Somebody is named
//! by the DNS names in the Subject Alternative Name of the certificate (RFC 5280 §4.2.1.6), where the
//! [role](crate::role) is, too; the Common Name is not looked at. Sessions are not resumed: every
//! connection proves its certificate anew.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    CertificateError, ClientConfig, Error as RustlsError, RootCertStore, ServerConfig, version,
};
use rustls_pki_types::pem::{Error as PemError, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::credentials;
use crate::pki::Certificate;
use crate::role::{Role, RoleError};

/// Where the PEM files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the CAs that peers' certificates are checked against.
    pub ca: PathBuf,
    /// This host's certificate, followed by intermediate ones if there are any.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Default for TlsFiles {
    /// Where what `roamcast pki issue` makes is copied to, unless systemd has read it for this process.
    fn default() -> Self {
        Self {
            ca: credentials::find_or("cacert.pem", "/etc/pki/roamcast/cacert.pem"),
            certificate: credentials::find_or("cert.pem", "/etc/pki/roamcast/cert.pem"),
            key: credentials::find_or("key.pem", "/etc/pki/roamcast/private/key.pem"),
        }
    }
}

impl From<&Certificate> for TlsFiles {
    fn from(issued: &Certificate) -> Self {
        Self {
            ca: issued.ca.clone(),
            certificate: issued.certificate.clone(),
            key: issued.key.clone(),
        }
    }
}

/// Why TLS cannot be set up from the files.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing or unreadable.
    #[error("Cannot read {what} {}: {reason}; make one by `roamcast pki issue` (libvirt's own serves no longer), or correct [tls] in the configuration", path.display())]
    Read {
        /// What the file holds.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// A file holds nothing of the kind.
    #[error("{} holds no {what} in PEM form; put one there", path.display())]
    Empty {
        /// What the file should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The certificate is no longer or not yet valid.
    #[error("The certificate {} is expired or not yet valid; issue a new one", path.display())]
    Expired {
        /// The file.
        path: PathBuf,
    },
    /// The CA did not sign the certificate.
    #[error("The certificate {} is not signed by the CA in {}; use the CA that issued it", path.display(), ca.display())]
    WrongCa {
        /// The certificate's file.
        path: PathBuf,
        /// The CA's file.
        ca: PathBuf,
    },
    /// The certificate is for another name.
    #[error("The certificate {} names {names:?} but this host is `{name}`; issue one for that name", path.display())]
    WrongName {
        /// The certificate's file.
        path: PathBuf,
        /// The name in the configuration.
        name: String,
        /// DNS names in the certificate.
        names: Vec<String>,
    },
    /// The private key belongs to another certificate.
    #[error("The private key {} does not belong to the certificate {}; use the pair that was issued together", key.display(), certificate.display())]
    WrongKey {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// The name cannot be in a certificate.
    #[error("The name `{name}` is not a DNS name; choose one of letters, digits and hyphens")]
    InvalidName {
        /// The name.
        name: String,
    },
    /// The certificate has no role.
    #[error("The certificate {} {error}; issue a new one with `roamcast pki issue DIRECTORY {name} --role {role}`", path.display())]
    NoRole {
        /// The certificate's file.
        path: PathBuf,
        /// What is wrong with it.
        error: RoleError,
        /// The name in the configuration.
        name: String,
        /// The role that it should have.
        role: Role,
    },
    /// The certificate has another role.
    #[error("The certificate {} is of the role {theirs}, but {name} is to be of the role {role}; issue one with `roamcast pki issue DIRECTORY {name} --role {role}`", path.display())]
    WrongRole {
        /// The certificate's file.
        path: PathBuf,
        /// The role in it.
        theirs: Role,
        /// The name in the configuration.
        name: String,
        /// The role that it should have.
        role: Role,
    },
    /// The certificate is refused for another reason (purpose, algorithm, encoding).
    #[error("The certificate {} cannot be used: {reason}; issue one for server and client use", path.display())]
    Certificate {
        /// The certificate's file.
        path: PathBuf,
        /// What is wrong with it.
        reason: RustlsError,
    },
}

/// Both sides' configuration of TLS.
#[derive(Clone, Debug)]
pub struct Tls {
    /// What this host is.
    pub(super) role: Role,
    pub(super) server: Arc<ServerConfig>,
    pub(super) client: Arc<ClientConfig>,
    name: String,
    files: TlsFiles,
    stamps: Stamps,
}

/// What tells a file from the one that replaces it.
type Stamp = (u64, u64, i64, i64);
/// The stamps of CA, certificate and key, of those that are there.
pub(super) type Stamps = [Option<Stamp>; 3];

impl TlsFiles {
    fn stamps(&self) -> Stamps {
        [&self.ca, &self.certificate, &self.key].map(|path| {
            let found = path.metadata().ok()?;
            Some((found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
        })
    }
}

impl Tls {
    /// Loads the files and checks that the certificate is what peers will accept from `name`, which is to
    /// be of this role.
    ///
    /// # Errors
    ///
    /// See [`TlsError`]; every file is named.
    pub fn load(files: &TlsFiles, name: &str, role: Role) -> Result<Self, TlsError> {
        // First, so that what changes meanwhile is seen later.
        let stamps = files.stamps();
        let roots = Arc::new(read_roots(&files.ca)?);
        let chain = read_certificates("certificate", &files.certificate)?;
        let key = read_key(&files.key)?;
        let provider = Arc::new(ring::default_provider());
        let own = check_own(&provider, &roots, &chain, files, name)?;
        check_role(own, files, name, role)?;

        let pair = |error| match error {
            RustlsError::InconsistentKeys(_) => TlsError::WrongKey {
                key: files.key.clone(),
                certificate: files.certificate.clone(),
            },
            reason => TlsError::Certificate {
                path: files.certificate.clone(),
                reason,
            },
        };
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .build()
                .map_err(|error| pair(RustlsError::General(error.to_string())))?;
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&version::TLS13])
            .map_err(pair)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(pair)?;
        server.send_tls13_tickets = 0;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13])
            .map_err(pair)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(pair)?;
        client.resumption = Resumption::disabled();
        Ok(Self {
            role,
            server: Arc::new(server),
            client: Arc::new(client),
            name: name.to_owned(),
            files: files.clone(),
            stamps,
        })
    }

    /// The stamps of the files as they are now; `None` where they are those that were loaded.
    pub(super) fn changed(&self) -> Option<Stamps> {
        let stamps = self.files.stamps();
        (stamps != self.stamps).then_some(stamps)
    }

    /// Loads the same files again.
    pub(super) fn reload(&self) -> Result<Self, TlsError> {
        Self::load(&self.files, &self.name, self.role)
    }
}

/// Returns the DNS names of a certificate, wildcards left out: a name identifies one agent.
pub fn certificate_names(certificate: &CertificateDer<'_>) -> Vec<String> {
    webpki::EndEntityCert::try_from(certificate)
        .map(|certificate| {
            certificate
                .valid_dns_names()
                .filter(|name| !name.contains('*'))
                .map(str::to_ascii_lowercase)
                .collect()
        })
        .unwrap_or_default()
}

/// Checks the certificate as a peer does; returns it.
fn check_own<'a>(
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    chain: &'a [CertificateDer<'static>],
    files: &TlsFiles,
    name: &str,
) -> Result<&'a CertificateDer<'static>, TlsError> {
    let server_name = ServerName::try_from(name.to_owned()).map_err(|_| TlsError::InvalidName {
        name: name.to_owned(),
    })?;
    let path = || files.certificate.clone();
    let other = |reason| TlsError::Certificate {
        path: path(),
        reason,
    };
    let Some((own, intermediates)) = chain.split_first() else {
        return Err(TlsError::Empty {
            what: "certificate",
            path: path(),
        });
    };
    let explain = |error| match error {
        RustlsError::InvalidCertificate(reason) => match reason {
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. } => TlsError::Expired { path: path() },
            CertificateError::UnknownIssuer | CertificateError::BadSignature => TlsError::WrongCa {
                path: path(),
                ca: files.ca.clone(),
            },
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                TlsError::WrongName {
                    path: path(),
                    name: name.to_owned(),
                    names: certificate_names(own),
                }
            }
            reason => other(RustlsError::InvalidCertificate(reason)),
        },
        error => other(error),
    };
    let now = UnixTime::now();
    WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider))
        .build()
        .map_err(|error| other(RustlsError::General(error.to_string())))?
        .verify_server_cert(own, intermediates, &server_name, &[], now)
        .map_err(explain)?;
    WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider))
        .build()
        .map_err(|error| other(RustlsError::General(error.to_string())))?
        .verify_client_cert(own, intermediates, now)
        .map_err(explain)?;
    Ok(own)
}

fn check_role(
    own: &CertificateDer<'_>,
    files: &TlsFiles,
    name: &str,
    role: Role,
) -> Result<(), TlsError> {
    let path = files.certificate.clone();
    let name = name.to_owned();
    match Role::of_certificate(own) {
        Ok(theirs) if theirs == role => Ok(()),
        Ok(theirs) => Err(TlsError::WrongRole {
            path,
            theirs,
            name,
            role,
        }),
        Err(error) => Err(TlsError::NoRole {
            path,
            error,
            name,
            role,
        }),
    }
}

fn read_roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates("CA certificate", path)? {
        roots.add(certificate).map_err(|error| TlsError::Read {
            what: "CA certificate",
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
    }
    Ok(roots)
}

fn read_certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = |error: PemError| pem_error(what, path, error);
    let certificates = CertificateDer::pem_file_iter(path)
        .map_err(read)?
        .collect::<Result<Vec<_>, _>>()
        .map_err(read)?;
    if certificates.is_empty() {
        return Err(TlsError::Empty {
            what,
            path: path.to_owned(),
        });
    }
    Ok(certificates)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| pem_error("private key", path, error))
}

fn pem_error(what: &'static str, path: &Path, error: PemError) -> TlsError {
    let path = path.to_owned();
    match error {
        PemError::NoItemsFound => TlsError::Empty { what, path },
        PemError::Io(error) => TlsError::Read {
            what,
            path,
            reason: error.to_string(),
        },
        error => TlsError::Read {
            what,
            path,
            reason: error.to_string(),
        },
    }
}
