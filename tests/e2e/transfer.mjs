// One transfer of the newest client, for `make bench`: how long it took, and how much of it was the client's own work.
//
//     node transfer.mjs upload <name> <file> | download <name> <directory>
//
// Prints `@@{"wall_s","cpu_s"}`; all other output is the client's own log.
import { DefaultArtifactClient } from 'artifact-6.2.1'
import path from 'node:path'

const [command, name, where] = process.argv.slice(2)
const client = new DefaultArtifactClient()
const begun = performance.now()
const before = process.cpuUsage()
if (command === 'upload') {
  await client.uploadArtifact(name, [where], path.dirname(where), { compressionLevel: 0 })
} else {
  const { artifact } = await client.getArtifact(name)
  await client.downloadArtifact(artifact.id, { path: where, expectedHash: artifact.digest })
}
const { user, system } = process.cpuUsage(before)
console.log(`@@${JSON.stringify({ wall_s: (performance.now() - begun) / 1e3, cpu_s: (user + system) / 1e6 })}`)
process.exit(0)
