//! Why certificates cannot be used.

use std::path::PathBuf;

use rustls::Error as RustlsError;

use crate::role::{Role, RoleError};

/// Why the files do not make a TLS configuration.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing or unreadable.
    #[error("Cannot read {what} {}: {reason}; make one by `roamcast pki issue` (libvirt's own serves no longer), or correct [tls] in the configuration", path.display())]
    Read {
        /// What the file holds.
        what: &'static str,
        /// Path of the file.
        path: PathBuf,
        /// Error of the system or of the PEM parser.
        reason: String,
    },
    /// A file has no PEM section of the expected kind.
    #[error("{} holds no {what} in PEM form; put one there", path.display())]
    Empty {
        /// Kind of PEM section that is missing.
        what: &'static str,
        /// Path of the file.
        path: PathBuf,
    },
    /// The certificate has expired or is not valid yet.
    #[error("The certificate {} is expired or not yet valid by this host's clock; issue a new one, or set the clock", path.display())]
    Expired {
        /// Path of the certificate.
        path: PathBuf,
    },
    /// The CRL lists the certificate.
    #[error("The certificate {} was revoked; issue a new one", path.display())]
    Revoked {
        /// Path of the certificate.
        path: PathBuf,
    },
    /// The file of revocation lists is broken.
    #[error("The list of revoked certificates {} cannot be used: {reason}; copy the one of `roamcast pki revoke` again", path.display())]
    Crl {
        /// Path of the CRL.
        path: PathBuf,
        /// Error of the parser or verifier.
        reason: String,
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
        /// Name in the configuration that is no DNS name.
        name: String,
    },
    /// The certificate names no valid role.
    #[error("The certificate {} {error}; issue a new one with `roamcast pki issue DIRECTORY {name} --role {role}`", path.display())]
    NoRole {
        /// The certificate's file.
        path: PathBuf,
        /// Error in the role names of the certificate.
        error: RoleError,
        /// The name in the configuration.
        name: String,
        /// Role that this host needs.
        role: Role,
    },
    /// The certificate has another role.
    #[error("The certificate {} is of the role {theirs}, but {name} is to be of the role {role}; issue one with `roamcast pki issue DIRECTORY {name} --role {role}`", path.display())]
    WrongRole {
        /// The certificate's file.
        path: PathBuf,
        /// Role in the certificate.
        theirs: Role,
        /// The name in the configuration.
        name: String,
        /// Role that this host needs.
        role: Role,
    },
    /// The verifier refuses the certificate for another reason (purpose, algorithm, encoding).
    #[error("The certificate {} cannot be used: {reason}; issue one for server and client use", path.display())]
    Certificate {
        /// The certificate's file.
        path: PathBuf,
        /// Error of the verifier.
        reason: RustlsError,
    },
}
