//! Why certificates cannot be used.

use std::path::PathBuf;

use rustls::Error as RustlsError;

use crate::role::{Role, RoleError};

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
    #[error("The certificate {} is expired or not yet valid by this host's clock; issue a new one, or set the clock", path.display())]
    Expired {
        /// The file.
        path: PathBuf,
    },
    /// The certificate was revoked.
    #[error("The certificate {} was revoked; issue a new one", path.display())]
    Revoked {
        /// The file.
        path: PathBuf,
    },
    /// The list of revoked certificates is broken.
    #[error("The list of revoked certificates {} cannot be used: {reason}; copy the one of `roamcast pki revoke` again", path.display())]
    Crl {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
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
