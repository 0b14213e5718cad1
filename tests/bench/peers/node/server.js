// The emergency stop as a Node team would write it: fastify and pg, one process or a cluster, named statements, pipelined in two round trips.
import cluster from 'node:cluster'
import { timingSafeEqual } from 'node:crypto'
import Fastify from 'fastify'
import pg from 'pg'

const WORKERS = Number(process.env.WORKERS)

const lockJob = { name: 'lock_job', text: 'SELECT status FROM jobs WHERE id = $1 FOR UPDATE' }
const stopExecutions = {
  name: 'stop_executions',
  text: `UPDATE executions SET status = 'failed', completed_at = $2,
      output = COALESCE(output, '{}') || '{"error": "Emergency stop by admin", "emergency_stop": true}'
    WHERE job_id = $1 AND status IN ('pending', 'running', 'processing')`,
}
const stopJob = {
  name: 'stop_job',
  text: `UPDATE jobs SET status = 'failed', updated_at = $2, metadata = COALESCE(metadata, '{}') || $3 WHERE id = $1`,
}
const audit = {
  name: 'audit',
  text: `INSERT INTO emergency_stops (job_id, previous_status, executions_stopped, reason, stopped_at) VALUES ($1, $2, $3, $4, $5)`,
}
const notify = { name: 'notify', text: `SELECT pg_notify('emergency_stop', $1)` }

const terminal = new Set(['completed', 'failed', 'cancelled'])
const token = Buffer.from(process.env.ADMIN_TOKEN)

function isAdmin(request) {
  const given = Buffer.from(request.headers['x-admin-token'] ?? '')
  return given.length === token.length && timingSafeEqual(given, token)
}

async function stop(client, id, reason) {
  const now = new Date()
  // What each round trip sends needs nothing from the answers to its other statements.
  const [, { rows }, { rowCount: count }] = await Promise.all([
    client.query('BEGIN'),
    client.query({ ...lockJob, values: [id] }),
    client.query({ ...stopExecutions, values: [id, now] }),
  ])
  const previous = rows[0]?.status
  if (previous === undefined || terminal.has(previous)) {
    await client.query('ROLLBACK')
    if (previous === undefined) return [404, { error: 'job not found', job_id: id }]
    return [200, { ok: true, message: 'Job already in terminal state', job_id: id, status: previous, action: 'none' }]
  }
  const stoppedAt = now.toISOString().replace(/\.\d+Z$/, 'Z')
  const mark = { emergency_stop: true, stopped_at: stoppedAt, stopped_by: 'admin', reason: reason ?? undefined }
  await Promise.all([
    client.query({ ...stopJob, values: [id, now, mark] }),
    client.query({ ...audit, values: [id, previous, count, reason, now] }),
    client.query({ ...notify, values: [JSON.stringify({ job_id: id, stopped_at: stoppedAt, executions_stopped: count })] }),
    client.query('COMMIT'),
  ])
  return [200, {
    ok: true, message: 'Job emergency stopped', job_id: id, previous_status: previous, new_status: 'failed',
    executions_stopped: count, stopped_at: stoppedAt, reason: reason ?? undefined,
  }]
}

async function serve() {
  const size = Number(process.env.POOL)
  const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL, min: size, max: size, idleTimeoutMillis: 0, pipeline: true })
  const app = Fastify({ logger: { stream: process.stderr }, disableRequestLogging: true })
  const answer = { type: 'object', additionalProperties: true, properties: {
    ok: { type: 'boolean' }, message: { type: 'string' }, job_id: { type: 'string' }, previous_status: { type: 'string' },
    new_status: { type: 'string' }, status: { type: 'string' }, action: { type: 'string' }, executions_stopped: { type: 'integer' },
    stopped_at: { type: 'string' }, reason: { type: 'string' },
  } }
  const body = { type: 'object', nullable: true, properties: { reason: { type: 'string', maxLength: 1000, nullable: true } } }
  app.post('/admin/jobs/:id/emergency-stop', { schema: { body, response: { 200: answer } } }, async (request, reply) => {
    if (!isAdmin(request)) return reply.code(403).send({ error: 'forbidden' })
    const started = performance.now()
    const client = await pool.connect()
    let failed
    try {
      const [status, summary] = await stop(client, request.params.id, request.body?.reason ?? null)
      request.log.info({
        event: 'emergency_stop', client: request.ip, job_id: request.params.id, executions_stopped: summary.executions_stopped,
        duration_ms: performance.now() - started, status,
      })
      return reply.code(status).send(summary)
    } catch (error) {
      failed = error
      throw error
    } finally {
      client.release(failed) // with an error the connection is ended, and its transaction with it
    }
  })
  await app.listen({ host: '127.0.0.1', port: Number(process.env.PORT) })
}

if (WORKERS > 1 && cluster.isPrimary) {
  for (let i = 0; i < WORKERS; i++) cluster.fork()
  cluster.on('exit', () => process.exit(1))
} else {
  await serve()
}
