//! A PostgreSQL under load in a session, with a client that is connected to it all the time.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use dormouse_api::{How, SessionInfo};

use crate::root_process::guest_output;
use crate::stage::{Stage, fall_asleep, inspect};
use crate::{figure, project};

/// Every page of it has a checksum, and whoever connects from elsewhere has to speak TLS.
const SERVER: &str = r#"set -e
chown postgres /data
exec chroot --userspec=postgres:postgres / sh -c '
set -e
cd /data
initdb --pgdata=pg --data-checksums --auth=trust --locale=C --encoding=UTF8
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=db -addext subjectAltName=DNS:db \
    -keyout pg/server.key -out pg/server.crt
echo "hostssl all all all trust" >> pg/pg_hba.conf
exec postgres -D pg -c listen_addresses=* -c ssl=on -c shared_buffers=64MB -c unix_socket_directories=/tmp'"#;

/// One connection, over which rows are written as long as it is there. A number is noted once its row is committed.
const CLIENT: &str = r#"for _ in $(seq 300); do
    psql -q "$DB" -c "create table records (n bigserial primary key, sum text not null)" && break
    sleep 1
done
while :; do
    echo "with next as (select nextval('records_n_seq') as n) insert into records select n, md5(n::text) from next returning n;"
    sleep 0.05
done | psql -qAt -v ON_ERROR_STOP=1 "$DB" > /noted/numbers"#;

/// How many rows there are, the last of them, whether each is what was written.
const ROWS: &str = "select count(*), max(n), bool_and(sum = md5(n::text)) from records";

/// The server runs in the container `db`, its client in the container `client`.
#[derive(Debug)]
pub struct Database<'a> {
    stage: &'a Stage,
    session: &'a SessionInfo,
    /// The last number that was seen.
    last: u64,
}

impl<'a> Database<'a> {
    /// Starts both. The first row is there afterwards.
    ///
    /// # Errors
    /// When `scripts/postgresql-image build/postgresql.tar` wasn't run, or they don't start.
    pub async fn start(stage: &'a Stage, session: &'a SessionInfo) -> Result<Self> {
        let image = project().join("build/postgresql.tar");
        let path = "ENV PATH=/usr/lib/postgresql/17/bin:/usr/sbin:/usr/bin";
        let import = ["import", "--change", path, image.to_str().context("paths are UTF-8")?, "postgresql"];
        stage.succeed(session, &import).await?;
        let server =
            ["--name", "db", "--volume", "db:/data", "--publish", "5432", "postgresql", "sh", "-c", SERVER];
        stage.succeed(session, &[&["run", "--detach"][..], &server].concat()).await?;
        let address = ["inspect", "--format", "{{.NetworkSettings.IPAddress}}", "db"];
        let address = stage.succeed(session, &address).await?;
        let address = address.trim();
        let connection = format!(
            "DB=host=db hostaddr={address} user=postgres dbname=postgres sslmode=verify-full sslrootcert=/data/pg/server.crt"
        );
        // While a volume is empty, each container that is made with it gives it the owner that the image has there.
        let volumes = ["--volume", "db:/data:ro,nocopy", "--volume", "noted:/noted", "--env", &connection];
        let client =
            [&["run", "--detach", "--name", "client"][..], &volumes, &["postgresql", "sh", "-c", CLIENT]];
        stage.succeed(session, &client.concat()).await?;
        let mut database = Self { stage, session, last: 0 };
        database.grows().await?;
        Ok(database)
    }

    /// Waits for a row that is newer than the last one seen: its client is connected, and what it writes is kept.
    ///
    /// # Errors
    /// When none comes.
    pub async fn grows(&mut self) -> Result<()> {
        let last = self.last;
        let newer = format!(
            "noted=/var/lib/docker/volumes/noted/_data/numbers; for _ in $(seq 3000); do \
             n=$(tail -n 1 $noted 2>/dev/null); [ ${{n:-0}} -gt {last} ] && echo $n && exit; sleep 0.1; done; exit 9"
        );
        let newer = guest_output(self.session, &newer).await;
        self.last = match newer {
            Ok(number) => number.trim().parse()?,
            Err(error) => return Err(error.context(self.logs().await)),
        };
        Ok(())
    }

    async fn logs(&self) -> String {
        let mut told = String::from("the client writes nothing more\n");
        for name in ["db", "client"] {
            if let Ok(output) = self.stage.run(self.session, &["logs", name]).await {
                told.push_str(&format!("-- {name} --\n{}", String::from_utf8_lossy(&output.stderr)));
            }
        }
        told
    }

    /// The first try of `psql` on the host, at the port that is published, while the VM sleeps.
    ///
    /// # Errors
    /// When it isn't answered.
    pub async fn answers_the_host(&self) -> Result<()> {
        let port = self.stage.succeed(self.session, &["port", "db", "5432/tcp"]).await?;
        let port = port.trim().rsplit_once(':').context("an address and a port")?.1.to_owned();
        fall_asleep(self.session).await?;
        let mut psql = Command::new("psql");
        let to = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres sslmode=require");
        psql.args(["-At", "-c", "select 6 * 7", &to]).stdin(Stdio::null());
        let begun = Instant::now();
        let answered = self.stage.finish(self.session, psql).await?;
        figure("psql on the host, of a database that sleeps", begun.elapsed());
        ensure!(answered.status.success() && answered.stdout == b"42\n", "{answered:?}");
        let info = inspect(self.session).await?;
        ensure!(info.vm.how == Some(How::Resume), "{info:?}");
        Ok(())
    }

    /// A new connection, by TLS, to a server whose certificate is verified.
    ///
    /// # Errors
    /// When that fails.
    pub async fn speaks_tls(&self) -> Result<()> {
        let ask = "psql -At \"$DB\" -c 'select version from pg_stat_ssl where pid = pg_backend_pid()'";
        let version = self.stage.succeed(self.session, &["exec", "client", "sh", "-c", ask]).await?;
        ensure!(version.starts_with("TLSv1."), "{version:?}");
        Ok(())
    }

    /// Ends both, and looks at every row and every page. Gives the number of rows.
    ///
    /// # Errors
    /// When a row is missing or wrong, or a page is damaged.
    pub async fn check(self) -> Result<u64> {
        self.stage.succeed(self.session, &["stop", "--time", "1", "client"]).await?;
        let noted =
            guest_output(self.session, "tail -n 1 /var/lib/docker/volumes/noted/_data/numbers").await?;
        let ask = ["exec", "db", "psql", "-At", "-h", "/tmp", "-U", "postgres", "-c", ROWS];
        let rows = self.stage.succeed(self.session, &ask).await?;
        let mut parts = rows.trim().split('|');
        let mut number = || parts.next().and_then(|part| part.parse::<u64>().ok());
        let (count, last) = (number().context("a count")?, number().context("a number")?);
        // Numbers are given out in order, so there are as many as the last one says.
        ensure!(
            count == last && last >= noted.trim().parse()? && rows.trim().ends_with("|t"),
            "{rows}, {noted}"
        );
        self.stage.succeed(self.session, &["stop", "--time", "120", "db"]).await?;
        let pages = ["run", "--rm", "--volume", "db:/data", "postgresql"];
        let check =
            ["chroot", "--userspec=postgres:postgres", "/", "pg_checksums", "--check", "--pgdata=/data/pg"];
        let told = self.stage.succeed(self.session, &[&pages[..], &check].concat()).await?;
        ensure!(told.contains("Bad checksums:  0"), "{told}");
        Ok(count)
    }
}
