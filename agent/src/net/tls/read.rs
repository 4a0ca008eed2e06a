//! Reads the PEM files.

use std::path::Path;

use rustls::RootCertStore;
use rustls_pki_types::pem::{Error as PemError, PemObject};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use super::TlsError;

/// Returns the revocation lists in a file; an empty list if there is no file.
pub(super) fn crls(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let broken = |error: PemError| TlsError::Crl {
        path: path.to_owned(),
        reason: error.to_string(),
    };
    let crls = CertificateRevocationListDer::pem_file_iter(path)
        .map_err(broken)?
        .collect::<Result<Vec<_>, _>>()
        .map_err(broken)?;
    if crls.is_empty() {
        return Err(TlsError::Crl {
            path: path.to_owned(),
            reason: "it holds none in PEM form".to_owned(),
        });
    }
    Ok(crls)
}

pub(super) fn roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("CA certificate", path)? {
        roots.add(certificate).map_err(|error| TlsError::Read {
            what: "CA certificate",
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
    }
    Ok(roots)
}

pub(super) fn certificates(
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

pub(super) fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
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
