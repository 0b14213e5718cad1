-- The tables: jobs, executions, and the append-only records of what was done to them: emergency_stops, batch_changes.
--
-- The files of this folder are loaded in the order of their names, by psql or by any other client, into the
-- first schema of the installer's search_path. They can be loaded again, over a running system, at any time:
-- what is there already is neither changed nor locked.
--
-- Raises   datatype_mismatch (42804)      a column of an existing table has a type that cannot work
--          undefined_column (42703)       an existing table lacks a column that cannot be made up
--          wrong_object_type (42809)      jobs or executions is not a table
--          invalid_table_definition (42P16)  jobs.id is not unique

-- Existing tables: refuse what cannot work, add the columns that can be empty.
DO $$
DECLARE
    v_text CONSTANT regtype[] := '{text,varchar}';
    v_time CONSTANT regtype[] := '{timestamptz,timestamp}';
    v_need record;
    v_type regtype;
    v_size int;
    v_generated boolean;
    v_kind "char";
BEGIN
    FOR v_need IN
        SELECT n.*
        FROM (VALUES
            ('jobs',       'id',           v_text,                         1, false),
            ('jobs',       'status',       v_text,                         7, false),
            ('jobs',       'metadata',     '{jsonb}'::regtype[],           0, true),
            ('jobs',       'created_at',   v_time,                         0, true),
            ('jobs',       'updated_at',   v_time,                         0, true),
            ('executions', 'id',           '{bigint,int,smallint}'::regtype[], 0, false),
            ('executions', 'job_id',       v_text,                         1, false),
            ('executions', 'status',       v_text,                         7, false),
            ('executions', 'output',       '{jsonb}'::regtype[],           0, true),
            ('executions', 'created_at',   v_time,                         0, true),
            ('executions', 'started_at',   v_time,                         0, true),
            ('executions', 'completed_at', v_time,                         0, true)
        ) AS n (table_name, column_name, types, min_length, can_be_added)
    LOOP
        SELECT c.relkind INTO v_kind FROM pg_class c WHERE c.oid = to_regclass(v_need.table_name);
        CONTINUE WHEN NOT FOUND;
        -- Rows that move between partitions, or are written to a child, pass by the triggers of the guard.
        IF v_kind <> 'r' OR EXISTS (SELECT FROM pg_inherits i WHERE to_regclass(v_need.table_name) IN (i.inhrelid, i.inhparent)) THEN
            RAISE wrong_object_type
                USING MESSAGE = format('%s is not an ordinary table: expected one without partitions or children', v_need.table_name);
        END IF;

        SELECT a.atttypid, a.atttypmod - 4, a.attgenerated <> '' INTO v_type, v_size, v_generated  -- 4: what varchar(n) adds to n
        FROM pg_attribute a
        WHERE a.attrelid = to_regclass(v_need.table_name) AND a.attname = v_need.column_name AND NOT a.attisdropped;
        IF NOT FOUND AND v_need.can_be_added THEN
            EXECUTE format('ALTER TABLE %I ADD COLUMN %I %s', v_need.table_name, v_need.column_name, v_need.types[1]);
            IF v_need.column_name IN ('created_at', 'updated_at') THEN  -- for new rows only: nobody knows it of the old ones
                EXECUTE format('ALTER TABLE %I ALTER COLUMN %I SET DEFAULT now()', v_need.table_name, v_need.column_name);
            END IF;
        ELSIF NOT FOUND THEN
            RAISE undefined_column
                USING MESSAGE = format('column %s.%s is missing: expected %s',
                                       v_need.table_name, v_need.column_name, array_to_string(v_need.types, ' or '));
        ELSIF v_generated THEN
            RAISE datatype_mismatch
                USING MESSAGE = format('column %s.%s is generated: expected one that can be set', v_need.table_name, v_need.column_name);
        ELSIF v_type <> ALL (v_need.types) THEN
            RAISE datatype_mismatch
                USING MESSAGE = format('column %s.%s has type %s: expected %s',
                                       v_need.table_name, v_need.column_name, v_type, array_to_string(v_need.types, ' or '));
        ELSIF v_size BETWEEN 1 AND v_need.min_length - 1 THEN
            RAISE datatype_mismatch
                USING MESSAGE = format('column %s.%s is varchar(%s): expected room for at least %s characters',
                                       v_need.table_name, v_need.column_name, v_size, v_need.min_length);
        END IF;
    END LOOP;

    IF to_regclass('jobs') IS NOT NULL AND NOT EXISTS (
        SELECT
        FROM pg_index i
        JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = to_regclass('jobs') AND i.indisunique AND i.indisvalid
          AND i.indpred IS NULL AND i.indnkeyatts = 1 AND a.attname = 'id'
    ) THEN
        RAISE invalid_table_definition
            USING MESSAGE = 'column jobs.id is not unique: expected a primary key or a unique index on it alone';
    END IF;
END;
$$;

-- What is not there at all.
DO $$
BEGIN
    IF to_regclass('jobs') IS NULL THEN
        CREATE TABLE jobs (
            id         text PRIMARY KEY CHECK (length(id) BETWEEN 1 AND 255),
            status     text NOT NULL DEFAULT 'created',
            metadata   jsonb,
            created_at timestamptz NOT NULL DEFAULT now(),
            updated_at timestamptz NOT NULL DEFAULT now()
        );
    END IF;
    IF to_regclass('executions') IS NULL THEN
        CREATE TABLE executions (
            id           bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY WITH (fillfactor = 60),
            job_id       text NOT NULL REFERENCES jobs,
            status       text NOT NULL DEFAULT 'pending',
            output       jsonb,
            created_at   timestamptz NOT NULL DEFAULT now(),
            started_at   timestamptz,
            completed_at timestamptz
        );
    END IF;
END;
$$;

-- The stop finds a job's active executions, and the listing a job's executions in id order, at a cost that
-- the size of the tables has no part in; so do the batches their jobs, in the order in which they take them.
-- An index that a stop adds to, a second entry beside the first for each active execution, has room for it.
-- CREATE INDEX IF NOT EXISTS would lock the table before it looks.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_indexes i WHERE i.schemaname = current_schema() AND i.tablename = 'executions' AND i.indexname = 'executions_job_id_unfinished_idx') THEN
        CREATE INDEX executions_job_id_unfinished_idx ON executions (job_id, status) WHERE status NOT IN ('completed', 'failed', 'cancelled');
        DROP INDEX IF EXISTS executions_job_id_active_idx;  -- of version 1.0
    END IF;
    IF NOT EXISTS (SELECT FROM pg_indexes i WHERE i.schemaname = current_schema() AND i.tablename = 'executions' AND i.indexname = 'executions_job_id_id_idx') THEN
        CREATE INDEX executions_job_id_id_idx ON executions (job_id, id) WITH (fillfactor = 60);
    END IF;
    IF NOT EXISTS (SELECT FROM pg_indexes i WHERE i.schemaname = current_schema() AND i.tablename = 'jobs' AND i.indexname = 'jobs_updated_at_ongoing_idx') THEN
        CREATE INDEX jobs_updated_at_ongoing_idx ON jobs (COALESCE(updated_at, '-infinity'), id)
            WHERE status IN ('created', 'pending', 'processing');
        DROP INDEX IF EXISTS jobs_updated_at_unfinished_idx;  -- of version 1.0
    END IF;
    IF NOT EXISTS (SELECT FROM pg_indexes i WHERE i.schemaname = current_schema() AND i.tablename = 'jobs' AND i.indexname = 'jobs_updated_at_failed_idx') THEN
        CREATE INDEX jobs_updated_at_failed_idx ON jobs (updated_at, id) WHERE status = 'failed';
    END IF;
END;
$$;

CREATE TABLE IF NOT EXISTS emergency_stops (
    id                 bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id             text NOT NULL,  -- no foreign key: the record outlives the job
    previous_status    text NOT NULL,
    executions_stopped bigint NOT NULL CHECK (executions_stopped >= 0),
    reason             text CHECK (length(reason) <= 1000),
    stopped_by         text NOT NULL DEFAULT 'admin',
    database_user      text NOT NULL DEFAULT session_user,
    client_address     inet DEFAULT inet_client_addr(),
    stopped_at         timestamptz NOT NULL
);
-- What version 1.0 did not record yet.
ALTER TABLE emergency_stops
    ADD COLUMN IF NOT EXISTS action         text NOT NULL DEFAULT 'stop' CHECK (action IN ('stop', 'release')),
    ADD COLUMN IF NOT EXISTS new_status     text,
    ADD COLUMN IF NOT EXISTS sessions_ended int NOT NULL DEFAULT 0 CHECK (sessions_ended >= 0),
    ADD COLUMN IF NOT EXISTS caller         jsonb CHECK (jsonb_typeof(caller) = 'object');
CREATE INDEX IF NOT EXISTS emergency_stops_job_id_id_idx ON emergency_stops (job_id, id);
COMMENT ON TABLE emergency_stops IS 'Append-only: one row for each emergency stop and for each release.';
COMMENT ON COLUMN emergency_stops.stopped_at IS 'When the stop, or the release, was made.';
COMMENT ON COLUMN emergency_stops.new_status IS 'The state that the job was left in; NULL in rows of version 1.0.';
COMMENT ON COLUMN emergency_stops.sessions_ended IS 'How many sessions that held the job were ended.';
COMMENT ON COLUMN emergency_stops.caller IS 'What the caller says of itself: actor, client (its address), request_id.';
COMMENT ON COLUMN emergency_stops.client_address IS 'Where the database session came from; NULL for a Unix socket.';

CREATE TABLE IF NOT EXISTS batch_changes (
    id                 bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    operation          text NOT NULL CHECK (operation IN ('timeout_stuck_jobs', 'repair_stuck_jobs')),
    job_id             text NOT NULL,
    previous_status    text NOT NULL,
    executions_stopped bigint CHECK (executions_stopped >= 0),
    attempt            int CHECK (attempt > 0),
    changed_by         text NOT NULL DEFAULT 'admin',
    database_user      text NOT NULL DEFAULT session_user,
    client_address     inet DEFAULT inet_client_addr(),
    changed_at         timestamptz NOT NULL,
    CHECK (CASE operation WHEN 'timeout_stuck_jobs' THEN executions_stopped ELSE attempt END IS NOT NULL)
);
DO $$
BEGIN
    IF to_regclass('batch_changes_job_id_idx') IS NULL THEN
        CREATE INDEX batch_changes_job_id_idx ON batch_changes (job_id);
    END IF;
END;
$$;
COMMENT ON TABLE batch_changes IS 'Append-only: one row for each job that a batch, timeout_stuck_jobs or repair_stuck_jobs, has changed.';
COMMENT ON COLUMN batch_changes.executions_stopped IS 'Of timeout_stuck_jobs: how many executions it failed.';
COMMENT ON COLUMN batch_changes.attempt IS 'Of repair_stuck_jobs: 1 for the first republication of the job, at most 3.';

-- keep_append_only(): refuses every change of the records but their owner's, whatever rights were granted.
-- Raises   insufficient_privilege (42501)
-- Locks    nothing
CREATE OR REPLACE FUNCTION keep_append_only()
RETURNS trigger LANGUAGE plpgsql SECURITY INVOKER
SET search_path FROM CURRENT
AS $$
BEGIN
    IF current_user <> (SELECT pg_get_userbyid(c.relowner) FROM pg_class c WHERE c.oid = TG_RELID) THEN
        RAISE insufficient_privilege
            USING MESSAGE = format('table %s is append-only', TG_TABLE_NAME),
                  HINT = 'Only its owner may change or remove a row.';
    END IF;
    RETURN NULL;
END;
$$;
REVOKE ALL ON FUNCTION keep_append_only() FROM PUBLIC;
COMMENT ON FUNCTION keep_append_only() IS 'Trigger: the table is append-only for all but its owner.';

DO $$
DECLARE
    v_table   text;
    v_grantee name;
BEGIN
    FOREACH v_table IN ARRAY '{emergency_stops,batch_changes}'::text[] LOOP
        IF NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = to_regclass(v_table) AND t.tgname = 'append_only') THEN
            EXECUTE format('CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON %I
                                FOR EACH STATEMENT EXECUTE FUNCTION keep_append_only()', v_table);
        END IF;
        -- Default privileges of the installer may have granted more than reading, of the table and of its sequence.
        FOR v_grantee IN
            SELECT DISTINCT pg_get_userbyid(g.grantee)
            FROM pg_class c, aclexplode(c.relacl) g
            WHERE c.oid IN (to_regclass(v_table), to_regclass(v_table || '_id_seq')) AND g.grantee NOT IN (0, c.relowner)
        LOOP
            EXECUTE format('REVOKE INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER ON %I FROM %I', v_table, v_grantee);
            EXECUTE format('REVOKE ALL ON SEQUENCE %I FROM %I', v_table || '_id_seq', v_grantee);
        END LOOP;
        EXECUTE format('REVOKE ALL ON %I FROM PUBLIC', v_table);
        EXECUTE format('REVOKE ALL ON SEQUENCE %I FROM PUBLIC', v_table || '_id_seq');
    END LOOP;
END;
$$;

DO $$
BEGIN
    IF has_schema_privilege('public', current_schema(), 'CREATE') THEN
        RAISE WARNING USING
            MESSAGE = format('everyone may create functions in schema %I, also such as take the place of what these functions call', current_schema()),
            HINT = format('REVOKE CREATE ON SCHEMA %I FROM PUBLIC;', current_schema());
    END IF;
END;
$$;
