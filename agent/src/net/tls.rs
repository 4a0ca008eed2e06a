//! TLS of the signalling: TLS 1.3 only, with certificates on both sides.
//!
//! The CA must be one that libvirt does not trust, because whoever libvirt trusts is root on its
//! host. The DNS names in the Subject Alternative Name (RFC 5280 §4.2.1.6) identify a peer and
//! contain its [role](crate::role); the Common Name is ignored. Sessions are not resumed: every
//! connection checks the certificates again.

mod error;
mod read;

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, Error as RustlsError, RootCertStore, ServerConfig, version,
};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime};
use time::OffsetDateTime;

pub use error::TlsError;

use crate::credentials;
use crate::pki::Certificate;
use crate::role::Role;

/// Paths of the PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// CA certificates that verify the peers' certificates.
    pub ca: PathBuf,
    /// This host's certificate, followed by any intermediate certificates.
    pub certificate: PathBuf,
    /// Private key of this host's certificate.
    pub key: PathBuf,
    /// Revocation lists (CRLs) of the CAs. The file may be absent.
    pub crl: PathBuf,
}

impl Default for TlsFiles {
    /// The paths to which an operator copies the output of `roamcast pki issue`, unless systemd
    /// passes the files as credentials.
    fn default() -> Self {
        Self {
            ca: credentials::find_or("cacert.pem", "/etc/pki/roamcast/cacert.pem"),
            certificate: credentials::find_or("cert.pem", "/etc/pki/roamcast/cert.pem"),
            key: credentials::find_or("key.pem", "/etc/pki/roamcast/private/key.pem"),
            crl: credentials::find_or("crl.pem", "/etc/pki/roamcast/crl.pem"),
        }
    }
}

impl From<&Certificate> for TlsFiles {
    fn from(issued: &Certificate) -> Self {
        Self {
            ca: issued.ca.clone(),
            certificate: issued.certificate.clone(),
            key: issued.key.clone(),
            crl: issued.ca.with_file_name("crl.pem"),
        }
    }
}

/// TLS configuration for both directions.
#[derive(Clone, Debug)]
pub struct Tls {
    /// Role of this host.
    pub(super) role: Role,
    pub(super) server: Arc<ServerConfig>,
    pub(super) client: Arc<ClientConfig>,
    verifier: Arc<dyn ClientCertVerifier>,
    not_after: Option<OffsetDateTime>,
    has_crl: bool,
    name: String,
    files: TlsFiles,
    stamps: Stamps,
}

/// Why a certificate that was valid is no longer valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The validity period is over.
    Expired,
    /// The CRL of its CA lists the certificate.
    Revoked,
}

/// Trusted CAs, and the revocation lists.
#[derive(Clone)]
struct Trust {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    crls: Vec<CertificateRevocationListDer<'static>>,
}

impl Trust {
    fn of_clients(&self) -> Result<Arc<dyn ClientCertVerifier>, VerifierBuilderError> {
        let (roots, provider) = (Arc::clone(&self.roots), Arc::clone(&self.provider));
        WebPkiClientVerifier::builder_with_provider(roots, provider)
            .with_crls(self.crls.clone())
            .only_check_end_entity_revocation()
            .allow_unknown_revocation_status()
            .build()
    }

    fn of_servers(&self) -> Result<Arc<WebPkiServerVerifier>, VerifierBuilderError> {
        let (roots, provider) = (Arc::clone(&self.roots), Arc::clone(&self.provider));
        WebPkiServerVerifier::builder_with_provider(roots, provider)
            .with_crls(self.crls.clone())
            .only_check_end_entity_revocation()
            .allow_unknown_revocation_status()
            .build()
    }
}

/// (inode, length, mtime in s, its ns) of a file: differs between a file and its replacement.
type Stamp = (u64, u64, i64, i64);
/// Stamps of CA, certificate, key and CRL; `None` for a missing file.
pub(super) type Stamps = [Option<Stamp>; 4];

impl TlsFiles {
    fn stamps(&self) -> Stamps {
        [&self.ca, &self.certificate, &self.key, &self.crl].map(|path| {
            let found = path.metadata().ok()?;
            Some((found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
        })
    }
}

impl Tls {
    /// Loads the files and checks that peers will accept the certificate for `name` and `role`.
    ///
    /// # Errors
    ///
    /// See [`TlsError`]; each error names its file.
    pub fn load(files: &TlsFiles, name: &str, role: Role) -> Result<Self, TlsError> {
        // Read first, so that a change during loading is noticed later.
        let stamps = files.stamps();
        let roots = Arc::new(read::roots(&files.ca)?);
        let chain = read::certificates("certificate", &files.certificate)?;
        let key = read::key(&files.key)?;
        let crls = read::crls(&files.crl)?;
        let has_crl = !crls.is_empty();
        let provider = Arc::new(ring::default_provider());
        let trust = Trust {
            provider: Arc::clone(&provider),
            roots,
            crls,
        };
        let broken = |error| broken(error, files);
        let of_clients = trust.of_clients().map_err(broken)?;
        let of_servers = trust.of_servers().map_err(broken)?;
        let own = check_own(&of_clients, &of_servers, &chain, files, name)?;
        check_role(own, files, name, role)?;
        let not_after = not_after(own);

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
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&version::TLS13])
            .map_err(pair)?
            .with_client_cert_verifier(Arc::clone(&of_clients))
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(pair)?;
        server.send_tls13_tickets = 0;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13])
            .map_err(pair)?
            .with_webpki_verifier(of_servers)
            .with_client_auth_cert(chain, key)
            .map_err(pair)?;
        client.resumption = Resumption::disabled();
        Ok(Self {
            role,
            server: Arc::new(server),
            client: Arc::new(client),
            verifier: of_clients,
            not_after,
            has_crl,
            name: name.to_owned(),
            files: files.clone(),
            stamps,
        })
    }

    /// Why a peer's certificate, valid at the time of the connection, is no longer valid; `None` if
    /// it still is.
    pub(crate) fn ended(&self, chain: &[CertificateDer<'_>]) -> Option<Ended> {
        let (certificate, intermediates) = chain.split_first()?;
        let now = UnixTime::now();
        let verified = self
            .verifier
            .verify_client_cert(certificate, intermediates, now);
        match verified.err()? {
            RustlsError::InvalidCertificate(
                CertificateError::Expired | CertificateError::ExpiredContext { .. },
            ) => Some(Ended::Expired),
            RustlsError::InvalidCertificate(CertificateError::Revoked) => Some(Ended::Revoked),
            _ => None,
        }
    }

    /// Days from `now` until this host's certificate expires, rounded down.
    pub(crate) fn days_left(&self, now: OffsetDateTime) -> Option<i64> {
        Some((self.not_after? - now).whole_days())
    }

    /// Returns the current stamps of the files if they differ from those of the loaded files.
    pub(super) fn changed(&self) -> Option<Stamps> {
        let stamps = self.files.stamps();
        (stamps != self.stamps).then_some(stamps)
    }

    /// Loads the same files again.
    pub(crate) fn reload(&self) -> Result<Self, TlsError> {
        // Whoever can delete the CRL must not make revoked certificates valid again.
        if self.has_crl && !self.files.crl.exists() {
            return Err(TlsError::Crl {
                path: self.files.crl.clone(),
                reason: "it is gone".to_owned(),
            });
        }
        Self::load(&self.files, &self.name, self.role)
    }
}

/// Returns the DNS names of a certificate without wildcards, because a name identifies a single
/// agent.
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

/// End of the validity period (`notAfter`).
fn not_after(certificate: &CertificateDer<'_>) -> Option<OffsetDateTime> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(parsed.validity().not_after.to_datetime())
}

/// Converts an error of the verifier into the file that causes it.
fn broken(error: VerifierBuilderError, files: &TlsFiles) -> TlsError {
    match error {
        VerifierBuilderError::InvalidCrl(error) => TlsError::Crl {
            path: files.crl.clone(),
            reason: RustlsError::InvalidCertRevocationList(error).to_string(),
        },
        error => TlsError::Certificate {
            path: files.ca.clone(),
            reason: RustlsError::General(error.to_string()),
        },
    }
}

/// Verifies this host's certificate as a peer does, and returns it.
fn check_own<'a>(
    of_clients: &Arc<dyn ClientCertVerifier>,
    of_servers: &Arc<WebPkiServerVerifier>,
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
            CertificateError::Revoked => TlsError::Revoked { path: path() },
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
    of_servers
        .verify_server_cert(own, intermediates, &server_name, &[], now)
        .map_err(explain)?;
    of_clients
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
