//! Whether database, store and root secret belong together.
//!
//! Called by `app` at every start. A wrong bucket, an unmounted volume or another replica's secret stops here, before
//! a byte goes to the wrong place.

use anyhow::bail;
use uuid::Uuid;

use crate::db::Db;
use crate::papers::RootSecret;
use crate::storage::BlockStore;

const STORE_ID: &str = "store_id";
/// Set once the marker is in the store; from then on a store without it is another one.
const STORE_MARKED: &str = "store_marked";
const SECRET: &str = "root_secret_fingerprint";

/// Compares what the database remembers with what is there, and introduces them at the first start.
///
/// # Errors
/// One sentence that says which is wrong and what to do.
pub async fn check(db: &Db, store: &BlockStore, root_secret: &RootSecret) -> anyhow::Result<()> {
    if db.set_property_once(SECRET, root_secret.fingerprint()).await? != root_secret.fingerprint() {
        bail!(
            "the root secret is not the one that this database was set up with: restore that secret file, or use the database that belongs to this one"
        );
    }
    let marker = store.read_marker().await?;
    let known = db.property(STORE_ID).await?;
    match (&known, &marker) {
        (Some(known), Some(marker)) if known == marker => {}
        (_, Some(_)) => bail!(
            "the store belongs to another database: correct storage.url or database.url, or use an empty bucket or prefix"
        ),
        (Some(_), None) if db.property(STORE_MARKED).await?.is_some() => bail!(
            "the store is not the one that this database was set up with (it has no marker): correct storage.url, or mount the volume that is missing"
        ),
        // The first start, perhaps of several replicas at once, or one that was cut after the row was written.
        (_, None) => {
            let id = db.set_property_once(STORE_ID, &Uuid::new_v4().to_string()).await?;
            store.write_marker(&id).await?;
        }
    }
    db.set_property_once(STORE_MARKED, "yes").await?;
    Ok(())
}
